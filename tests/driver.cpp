// Calls every exported kernel on made-up logits and prints what it gives, where there is no Python.
// call.h: the part of cpu.cpp that describes a call.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "call.h"

#ifdef DOUBLE
typedef double real;
static const int DTYPE = FLOAT64;
#else
typedef float real;
static const int DTYPE = FLOAT32;
#endif

extern "C" int weighted_sum(const Call *call, Progress *progress);
extern "C" int class_sums(const Call *call, Progress *progress);
extern "C" int classify(const Call *call, Progress *progress);
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

static Tensor tensor(real *data, int height, int width) {
    int64_t plane = height * width;
    return {data, {N, C, height, width}, {C * plane, plane, width, 1}};
}

static void run(int (*kernel)(const Call *, Progress *), const Call &call) {
    for (int64_t &partial : partials) partial = 0;
    if (!kernel(&call, (Progress *)partials)) exit(1);
}

int main() {
    for (real &logit : z) logit = random_number();
    for (real &logit : guide) logit = random_number();
    for (real &weight : weights) weight = random_number();
    for (uint8_t &pixel : valid) pixel = random_number() < 3;
    for (int upsampled = 0; upsampled < 2; upsampled++) {
        const int height = upsampled ? SOURCE_H : H, width = upsampled ? SOURCE_W : W;
        const int size = C * height * width;
        Call call = {};
        call.z = tensor(z, height, width);
        call.guide = tensor(guide, height, width);
        call.valid = valid;
        call.y = y;
        call.weights = weights;
        if (upsampled) call.height = H, call.width = W, call.align_corners = 1;
        call.chunk_size = upsampled ? 2 : 100;
        call.chunks = upsampled ? SOURCE_H / 2 : (H * W + 99) / 100;
        call.ignore_index = -1;
        call.threshold = 0.5, call.has_threshold = 1;
        call.dimensions = 4, call.dtype = DTYPE, call.by_class = 1;
        call.result = counts;
        run(classify, call);
        print("y", y, N * H * W);
        print("counts", counts, N * (C + 1));
        call.result = sums;
        run(class_sums, call);
        print("class_sums", sums, N * C);
        call.grad = tensor(grad, height, width);
        for (int kind = SQUARE; kind <= LINEAR; kind++) {
            call.kind = kind;
            call.q = kind == SQUARE ? 2 : kind == POWER ? 0.5 : 1.0001;
            call.shift = 0.3, call.constant = 0.2;
            run(weighted_sum, call);
            print("sums", sums, N);
            print("grad", grad, N * size);
        }
        scale_grad(DTYPE, N, size, grad, weights, scaled);
        print("scaled", scaled, N * size);
    }
}
