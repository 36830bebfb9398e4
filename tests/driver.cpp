// Calls every exported kernel on made-up logits and prints what it gives, where there is no Python.
// task.h: the part of cpu.cpp that describes a task.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "task.h"

#ifdef DOUBLE
typedef double real;
static const int DTYPE = FLOAT64;
#else
typedef float real;
static const int DTYPE = FLOAT32;
#endif

extern "C" int weighted_sum(const Task *task, Progress *progress);
extern "C" int class_sums(const Task *task, Progress *progress);
extern "C" int classify(const Task *task, Progress *progress);
extern "C" void scale_grad(int dtype, int64_t images, int64_t size, real *grad, real *factors, void *out);

enum { N = 2, C = 19, SOURCE_H = 6, SOURCE_W = 9, H = 20, W = 31 };
static real z[N * C * H * W], guide[N * C * H * W], grad[N * C * H * W], scaled[N * C * H * W];
static real weights[N * C], sums[N * C];
static uint8_t valid[N * H * W];
static int8_t y[N * H * W];
static int64_t counts[N * (C + 1)];
static int64_t partials[1 << 16];  // Progress, then the partial results

static real random_number() {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (real)(((double)(state >> 40) / (1 << 24) - 0.5) * 8);
}

template <class T> static void print(const char *name, const T *values, int count) {
    printf("%s", name);
    for (int k = 0; k < count; k++) printf(" %.9g", (double)values[k]);
    printf("\n");
}

static TensorView view(real *data, int height, int width) {
    TensorView view = {};
    view.data = data;
    int64_t plane = height * width, stride[] = {C * plane, plane, plane, width, 1};
    for (int k = 0; k < 5; k++) view.stride[k] = stride[k];
    view.rows = {height - 1, 0, H - 1, height, H};
    view.columns = {width - 1, 0, W - 1, width, W};
    return view;
}

static void call(int (*kernel)(const Task *, Progress *), const Task &task) {
    for (int64_t &partial : partials) partial = 0;
    if (!kernel(&task, (Progress *)partials)) exit(1);
}

int main() {
    for (real &logit : z) logit = random_number();
    for (real &logit : guide) logit = random_number();
    for (real &weight : weights) weight = random_number();
    for (uint8_t &pixel : valid) pixel = random_number() < 3;
    for (int upsampled = 0; upsampled < 2; upsampled++) {
        const int height = upsampled ? SOURCE_H : H, width = upsampled ? SOURCE_W : W;
        const int size = C * height * width;
        Task task = {};
        task.z = view(z, height, width);
        task.guide = view(guide, height, width);
        task.valid = valid;
        task.y = y;
        task.weights = weights;
        task.images = N, task.classes = task.channels = C, task.length = H * W;
        task.shape[0] = 1, task.shape[1] = H, task.shape[2] = W;
        task.chunk_size = upsampled ? 2 : 100;
        task.chunks = upsampled ? SOURCE_H / 2 : (H * W + 99) / 100;
        task.ignore_index = -1;
        task.threshold = 0.5, task.has_threshold = 1;
        task.dtype = DTYPE, task.upsampled = upsampled, task.by_class = 1;
        task.result = counts;
        call(classify, task);
        print("y", y, N * H * W);
        print("counts", counts, N * (C + 1));
        task.result = sums;
        call(class_sums, task);
        print("class_sums", sums, N * C);
        task.grad = view(grad, height, width);
        for (int kind = SQUARE; kind <= LINEAR; kind++) {
            task.kind = kind;
            task.q = kind == SQUARE ? 2 : kind == POWER ? 0.5 : 1.0001;
            task.shift = 0.3, task.constant = 0.2;
            call(weighted_sum, task);
            print("sums", sums, N);
            print("grad", grad, N * size);
        }
        scale_grad(DTYPE, N, size, grad, weights, scaled);
        print("scaled", scaled, N * size);
    }
}
