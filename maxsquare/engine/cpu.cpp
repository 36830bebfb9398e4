// The three operators on CPUs, for logits of half and single precision, or of double (DOUBLE).
//
// A tile of neighbouring pixels with all their classes stays in the first-level cache. Upsampled
// logits exist only there: the low-resolution rows above and below a tile are interpolated once
// along the row, and then mixed for each row of pixels between them. The gradient takes the same way
// back: it is summed over those rows of pixels before it is spread over low-resolution columns.
//
// Work is divided into chunks that do not depend on the number of threads. Each chunk writes to its
// own memory, and the thread that completes the last chunk adds these partial results in order, so
// every number of threads gives the same bits. Threads take the next chunk from a counter, so a
// thread that is interrupted does not delay the others.
//
// The letters are those of potentials.py: p = exp(z - m) / Z, t = p L(p).

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

// Shared with cpu.py -------------------------------------------------------------------------------

enum Dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, UINT8, INT8, INT16, INT32, INT64 };
// As in potentials.py.
enum Kind { SQUARE, SHANNON, POWER, NEAR_ONE, CROSS_ENTROPY, LINEAR };

// A tensor (N, C, *spatial). Strides are in elements; entries beyond the last dimension are 0.
struct Tensor {
    void *data;
    int64_t shape[5], stride[5];
};

// The arguments of a call. The pointer of a missing tensor is NULL.
struct Call {
    Tensor z, guide, grad;  // an upsampled gradient is contiguous
    const void *labels;     // of any integer dtype
    const uint8_t *valid;
    void *y;              // written by classify, read by weighted_sum
    const void *weights;  // (N, C) or (N, 1)
    void *result;         // weighted_sum: (N,); class_sums: (N, C); classify: (N, C + 1) counts
    int64_t height, width;       // size to which logits are upsampled, or 0
    int64_t chunks, chunk_size;  // chunks of an image; pixels, or rows of cells, of a chunk
    int64_t ignore_index;
    double q, shift, constant, threshold;
    int32_t dimensions, align_corners, binary, dtype, label_dtype, wide_index, kind, by_class, has_threshold;
};
EXPORT const int64_t call_bytes = sizeof(Call);

// The threads share this, initially zero. The partial results of all chunks follow it in memory.
struct Progress {
    int64_t next, completed;  // chunks
    int64_t has_clamped;      // whether any logit is below the lowest one
};
EXPORT const int64_t progress_bytes = sizeof(Progress);

// Vectors ------------------------------------------------------------------------------------------

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))

// A vector fills a register. GCC compares and selects longer vectors lane by lane, which would take
// most of the time.
#if defined __AVX512F__
#define VECTOR_BYTES 64
#elif defined __AVX2__
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#ifdef DOUBLE
typedef double real;
typedef int64_t integer;
typedef uint64_t word;
static const int MANTISSA = 52, BIAS = 1023, LOG_TERMS = 11, EXPM1_TERMS = 16;
static const word ROOT_HALF = 0x3fe6a09e667f3bcd;
static const real ROUND = 6755399441055744 + BIAS, TINY = 2.2250738585072014e-308;
static const real LOG_TINY = -708.3964185322641;
// log 2 in two parts; the first has so few digits that its multiples are exact.
static const real LOG_2 = 0.6931471805592082, LOG_2_REST = 7.371002565167799e-13;
#else
typedef float real;
typedef int32_t integer;
typedef uint32_t word;
static const int MANTISSA = 23, BIAS = 127, LOG_TERMS = 5, EXPM1_TERMS = 9;
static const word ROOT_HALF = 0x3f3504f3;
static const real ROUND = 12582912 + BIAS, TINY = 1.17549435e-38f, LOG_TINY = -87.336545f;
static const real LOG_2 = 0.693359375f, LOG_2_REST = -0.00021219444f;
#endif

typedef real Reals __attribute__((vector_size(VECTOR_BYTES)));
typedef integer Integers __attribute__((vector_size(VECTOR_BYTES)));
typedef word Words __attribute__((vector_size(VECTOR_BYTES)));  // overflow is defined
static const int LANES = VECTOR_BYTES / sizeof(real);
// Every processor sums a tile in this many accumulators, so that all get the same result.
static const int GROUP = 64 / sizeof(real);

INLINE Reals load(const real *from) {
    Reals x;
    memcpy(&x, from, sizeof x);
    return x;
}
INLINE Integers load(const integer *from) {
    Integers x;
    memcpy(&x, from, sizeof x);
    return x;
}
INLINE void store(real *to, Reals x) { memcpy(to, &x, sizeof x); }
INLINE void store(integer *to, Integers x) { memcpy(to, &x, sizeof x); }
INLINE Reals splat(real x) { return Reals{} + x; }
INLINE Reals at_least(Reals x, real least) { return x < least ? splat(least) : x; }

// 0 below the logarithm of the smallest normal number, NaN for NaN; x must not overflow.
INLINE Reals exponential(Reals x) {
    Reals shifted = x * (real)1.4426950408889634 + ROUND;
    Reals n = shifted - ROUND;
    Reals r = x - n * LOG_2 - n * LOG_2_REST;
#ifdef DOUBLE
    // Taylor's series: the next term is below 4e-18.
    Reals y = r * (1.0 / 13) + 1.0;
    for (int k = 12; k > 0; k--) y = y * r * (1.0 / k) + 1.0;
#else
    // Fitted over |r| < log(2) / 2: relative error 3e-9.
    Reals y = r * 0.00138145395f + 0.00836874545f;
    y = y * r + 0.041668389f;
    y = y * r + 0.16666521f;
    y = y * r + 0.49999994f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
#endif
    // The low bits of `shifted` are those of n + BIAS, the exponent of 2^n. Adding n to the exponent
    // of y would be as fast, but would turn some NaNs into numbers.
    Reals power = (Reals)((Words)shifted << MANTISSA);
    return x < LOG_TINY ? Reals{} : y * power;
}

// k log 2 + 2 artanh(s), s = (f - 1) / (f + 1), of a normal x = 2^k f; NaN for NaN.
INLINE Reals logarithm(Reals x) {
    Integers k = (Integers)((Words)x - ROOT_HALF) >> MANTISSA;
    Reals f = (Reals)((Words)x - ((Words)k << MANTISSA));
    Reals s = (f - (real)1) / (f + (real)1), series = Reals{};
    for (int term = LOG_TERMS; term > 0; term--)
        series = (series + (real)1 / (2 * term + 1)) * s * s;
    Reals exponent = __builtin_convertvector(k, Reals);
    return exponent * LOG_2 + (exponent * LOG_2_REST + (s + s * series) * (real)2) + (x - x);
}

// exp(u) - 1, as a series where the difference would lose digits.
INLINE Reals exponential_less_1(Reals u) {
    Reals series = splat(1);
    for (int k = EXPM1_TERMS; k > 1; k--) series = series * u * ((real)1 / k) + (real)1;
    Reals difference = exponential(u) - (real)1;
    return (u < (real)0.5) & (u > (real)-0.5) ? u * series : difference;
}

// Number formats -----------------------------------------------------------------------------------

INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// Both round to nearest, ties to even.
struct BFloat16 {
    uint16_t bits;
    INLINE BFloat16 from(float x) {
        uint32_t u = bits_of(x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
        bool nan = (u & 0x7fffffff) > 0x7f800000;
        return {(uint16_t)(nan ? u >> 16 | 0x40 : rounded)};
    }
    operator real() const { return float_of((uint32_t)bits << 16); }
};

struct Float16 {
    uint16_t bits;
    INLINE Float16 from(float x) {
        uint32_t sign = bits_of(x) & 0x80000000, u = bits_of(x) ^ sign;
        // At 0.5 the last bit of a float32 is worth 2^-24, as is that of subnormal numbers.
        uint32_t small = bits_of(float_of(u) + 0.5f) - 0x3f000000;
        uint32_t normal = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
        uint32_t half = u < 0x38800000 ? small : u < 0x477ff000 ? normal : 0x7c00;
        return {(uint16_t)((u > 0x7f800000 ? 0x7e00 : half) | sign >> 16)};
    }
    operator real() const {
        uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
        uint32_t u = bits_of(float_of((uint32_t)(bits & 0x7fff) << 13) * 0x1p112f);
        bool finite = (bits & 0x7c00) != 0x7c00;
        return float_of(u | sign | (finite ? 0 : 0x7f800000));
    }
};

INLINE void assign(real &to, real x) { to = x; }
INLINE void assign(BFloat16 &to, real x) { to = BFloat16::from((float)x); }
INLINE void assign(Float16 &to, real x) { to = Float16::from((float)x); }

// Calls visit with the data as a pointer to its type.
template <class Visit> INLINE void with_type(int dtype, void *data, Visit visit) {
#ifndef DOUBLE
    if (dtype == BFLOAT16) return visit((BFloat16 *)data);
    if (dtype == FLOAT16) return visit((Float16 *)data);
#endif
    visit((real *)data);
}

// Likewise, for integers.
template <class Visit> INLINE void with_integers(int dtype, const void *data, Visit visit) {
    switch (dtype) {
        case UINT8: return visit((const uint8_t *)data);
        case INT8: return visit((const int8_t *)data);
        case INT16: return visit((const int16_t *)data);
        case INT32: return visit((const int32_t *)data);
        default: return visit((const int64_t *)data);
    }
}

// Tasks --------------------------------------------------------------------------------------------

// Pixel k of an axis lies at source position (k * scale + offset) / denominator. These are the
// positions of F.interpolate as exact fractions: in float32 one far from the origin would lose most
// of its digits.
struct Axis {
    int64_t scale, offset, denominator, source, size;
};

static Axis make_axis(int64_t source, int64_t size, bool align_corners) {
    if (!align_corners) return {2 * source, source - size, 2 * size, source, size};
    return {source > 1 ? source - 1 : 1, 0, size > 1 ? size - 1 : 1, source, size};
}

// A tensor with three spatial dimensions; missing ones come first and have length 1.
struct View {
    void *data;
    int64_t shape[3], stride[5];
    Axis rows, columns;  // if it is upsampled

    View(const Call &call, const Tensor &tensor) : data(tensor.data), shape{1, 1, 1}, stride{} {
        stride[0] = tensor.stride[0], stride[1] = tensor.stride[1];
        for (int d = 2; d < call.dimensions; d++) {
            shape[d + 3 - call.dimensions] = tensor.shape[d];
            stride[d + 5 - call.dimensions] = tensor.stride[d];
        }
        rows = make_axis(shape[1], call.height, call.align_corners);
        columns = make_axis(shape[2], call.width, call.align_corners);
    }

    // Whether one stride covers all spatial dimensions; it becomes that of the last one.
    bool make_flat() {
        int64_t step = -1, expected = -1;
        for (int d = 2; d >= 0; d--) {
            if (shape[d] == 1) continue;
            if (step < 0) step = expected = stride[2 + d];
            if (stride[2 + d] != expected) return false;
            expected *= shape[d];
        }
        stride[4] = step;
        return true;
    }
};

// A call, and the values derived from it.
struct Task : Call {
    const int64_t images, channels, classes;
    const bool upsampled;
    View z, guide, grad;
    int64_t length, shape[3];
    bool flat;

    explicit Task(const Call &call)
        : Call(call), images(call.z.shape[0]), channels(call.z.shape[1]), classes(binary ? 2 : channels),
          upsampled(height), z(call, call.z), guide(call, call.guide), grad(call, call.grad) {
        memcpy(shape, z.shape, sizeof shape);
        if (upsampled) shape[1] = height, shape[2] = width;
        length = shape[0] * shape[1] * shape[2];
        flat = !upsampled && z.make_flat() && (!guide.data || guide.make_flat()) &&
               (!grad.data || grad.make_flat());
    }
};

// The pixels of a chunk.
static int64_t begin_of(const Task &task, int64_t chunk) { return chunk * task.chunk_size; }
static int64_t end_of(const Task &task, int64_t chunk) {
    int64_t end = (chunk + 1) * task.chunk_size;
    return end < task.length ? end : task.length;
}

// Calls visit(image, chunk) for the chunks that no other thread has taken. Returns true to the thread
// that completes the last chunk.
template <class Visit> static bool for_chunks(const Task &task, Progress &progress, Visit visit) {
    const int64_t total = task.images * task.chunks;
    bool is_last = total == 0;
    for (;;) {
        int64_t chunk = __atomic_fetch_add(&progress.next, 1, __ATOMIC_RELAXED);
        if (chunk >= total) return is_last;
        visit(chunk / task.chunks, chunk % task.chunks);
        is_last |= __atomic_add_fetch(&progress.completed, 1, __ATOMIC_ACQ_REL) == total;
    }
}

// Memory -------------------------------------------------------------------------------------------

// The scratch memory of a thread, from which arrays are taken one after another.
struct Scratch {
    char *memory, *next;
    explicit Scratch(int64_t bytes) : memory((char *)malloc(bytes)), next(memory) {}
    ~Scratch() { free(memory); }
    template <class T> T *take(int64_t count) {
        char *aligned = (char *)(((uintptr_t)next + 63) & ~(uintptr_t)63);
        next = aligned + count * sizeof(T);
        return (T *)aligned;
    }
};

// Asks the system for large pages. The first use of a page costs a fault, and for 4 KiB of a
// full-resolution gradient the fault takes longer than the computation.
static void use_large_pages(void *data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1), end = ((uintptr_t)data + bytes) & ~(page - 1);
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Calls visit(x[c * tile + k], element) for the pixels of a tile, in the order of their memory.
template <class T, class Visit>
INLINE void visit_tile(const Task &task, const View &view, T *data, int64_t n, int64_t pixel,
                       int count, int tile, real *x, Visit visit) {
    const int64_t *shape = task.shape, *stride = view.stride;
    data += n * stride[0];
    if (task.flat && stride[4] == 1) {
        for (int64_t c = 0; c < task.channels; c++)
            for (int k = 0; k < count; k++) visit(x[c * tile + k], data[c * stride[1] + pixel + k]);
        return;
    }
    for (int k = 0; k < count; k++) {
        int64_t row = (pixel + k) / shape[2], column = (pixel + k) % shape[2];
        int64_t offset = row / shape[1] * stride[2] + row % shape[1] * stride[3] + column * stride[4];
        if (task.flat) offset = (pixel + k) * stride[4];
        for (int64_t c = 0; c < task.channels; c++)
            visit(x[c * tile + k], data[offset + c * stride[1]]);
    }
}

OUTLINE static void read_pixels(const Task &task, const View &view, int64_t n, int64_t pixel, int count,
                        int tile, real *x) {
    with_type(task.dtype, view.data, [&](auto *data) {
        visit_tile(task, view, data, n, pixel, count, tile, x, [](real &x, auto &z) { x = z; });
    });
    if (count < tile)
        for (int64_t c = 0; c < task.channels; c++)
            memset(x + c * tile + count, 0, (tile - count) * sizeof(real));
}

OUTLINE static void write_grads(const Task &task, int64_t n, int64_t pixel, int count, int tile, real *x) {
    with_type(task.dtype, task.grad.data, [&](auto *data) {
        visit_tile(task, task.grad, data, n, pixel, count, tile, x,
                   [](real &x, auto &grad) { assign(grad, x); });
    });
}

// Upsampling ---------------------------------------------------------------------------------------

// Replaces -inf, the logit of a masked class, before interpolation: 0 times -inf is NaN.
static const real LOWEST_LOGIT = (real)-1e30;

// The source row (column) at or before pixel k.
static int64_t source_index(const Axis &axis, int64_t k) {
    int64_t numerator = k * axis.scale + axis.offset;
    int64_t index = numerator > 0 ? numerator / axis.denominator : 0;
    return index < axis.source - 1 ? index : axis.source - 1;
}

// The weight of the next source row (column); the last one has no next one.
static real lerp_weight(const Axis &axis, int64_t k, int64_t index) {
    int64_t rest = k * axis.scale + axis.offset - index * axis.denominator;
    return rest > 0 && index < axis.source - 1 ? (real)((double)rest / (double)axis.denominator) : 0;
}

// The first pixel at source position i or beyond.
static int64_t first_pixel(const Axis &axis, int64_t i) {
    if (i <= 0) return 0;
    if (i >= axis.source) return axis.size;
    int64_t first = (i * axis.denominator - axis.offset + axis.scale - 1) / axis.scale;
    return first < axis.size ? first : axis.size;
}

// Reads tiles of logits (channels, tile), and upsamples them if the task requires it.
struct Reader {
    const Task &task;
    Progress &progress;
    const View &view;
    const int tile;
    int64_t image = -1, tile_column = -1, source_row = -1;  // the position of `top`
    int32_t *index;      // the source index of every column of the result
    real *weight;        // the lerp weight of every column
    real *source;        // a source row
    real *top, *bottom;  // (channels, tile): the source rows above and below, interpolated along the row

    static int64_t bytes(const Task &task, const View &view, int tile) {
        if (!task.upsampled) return 0;
        int64_t reals = view.columns.size + view.columns.source + 1 + 2 * task.channels * tile;
        return 5 * 64 + view.columns.size * sizeof(int32_t) + reals * sizeof(real);
    }

    Reader(const Task &task, Progress &progress, const View &view, int tile, Scratch &scratch)
        : task(task), progress(progress), view(view), tile(tile) {
        if (!scratch.memory || !task.upsampled) return;
        index = scratch.take<int32_t>(view.columns.size);
        weight = scratch.take<real>(view.columns.size);
        source = scratch.take<real>(view.columns.source + 1);
        top = scratch.take<real>(task.channels * tile);
        bottom = scratch.take<real>(task.channels * tile);
        for (int64_t k = 0; k < view.columns.size; k++) {
            index[k] = (int32_t)source_index(view.columns, k);
            weight[k] = lerp_weight(view.columns, k, index[k]);
        }
    }

    // Reads `count` pixels of image n; without upsampling an image is one row. Returns the lerp
    // weight of the lower source row.
    real read(int64_t n, int64_t row, int64_t column, int count, real *x) {
        if (task.upsampled) return read_upsampled(n, row, column, count, x);
        read_pixels(task, view, n, column, count, tile, x);
        return 0;
    }

    OUTLINE real read_upsampled(int64_t n, int64_t row, int64_t column, int count, real *x) {
        int64_t i = source_index(view.rows, row);
        if (n != image || column != tile_column) source_row = -1;
        if (i == source_row + 1 && source_row >= 0) {
            real *above = top;
            top = bottom;
            bottom = above;
        } else if (i != source_row) {
            read_source(n, i, column, count, top);
        }
        if (i != source_row) read_source(n, i + 1 < view.rows.source ? i + 1 : i, column, count, bottom);
        image = n, tile_column = column, source_row = i;
        real down = lerp_weight(view.rows, row, i);
        for (int64_t k = 0; k < task.channels * tile; k++) x[k] = (1 - down) * top[k] + down * bottom[k];
        return down;
    }

    // Source row i, interpolated to `count` columns of the result.
    OUTLINE void read_source(int64_t n, int64_t i, int64_t column, int count, real *out) {
        int64_t begin = index[column], end = index[column + count - 1] + 2;
        end = end < view.columns.source ? end : view.columns.source;
        with_type(task.dtype, view.data, [&](auto *data) {
            for (int64_t c = 0; c < task.channels; c++, out += tile) {
                auto *row = data + n * view.stride[0] + c * view.stride[1] + i * view.stride[3];
                int32_t has_clamped = 0;
                for (int64_t j = begin; j < end; j++) {
                    real z = row[j * view.stride[4]];
                    has_clamped |= z < LOWEST_LOGIT;
                    source[j] = z < LOWEST_LOGIT ? LOWEST_LOGIT : z;
                }
                if (has_clamped) __atomic_store_n(&progress.has_clamped, 1, __ATOMIC_RELAXED);
                source[end] = source[end - 1];
                for (int k = 0; k < count; k++) {
                    const real *left = source + index[column + k], right = weight[column + k];
                    out[k] = (1 - right) * left[0] + right * left[1];
                }
                for (int k = count; k < tile; k++) out[k] = 0;
            }
        });
    }

    // Adds the gradients of a tile's pixels to a source row (channels, columns) with this stride.
    OUTLINE void add_grads(const real *grads, int64_t column, int count, real *row, int64_t stride) {
        for (int64_t c = 0; c < task.channels; c++, grads += tile, row += stride)
            for (int k = 0; k < count;) {
                int32_t j = index[column + k];
                real left = 0, right = 0;
                for (; k < count && index[column + k] == j; k++) {
                    left += grads[k] * (1 - weight[column + k]);
                    right += grads[k] * weight[column + k];
                }
                row[j] += left;
                if (j + 1 < view.columns.source) row[j + 1] += right;
            }
    }
};

// Calls visit(row, column, count, pixel) for the tiles of a chunk; see Reader::read.
template <class Visit> INLINE void for_tiles(const Task &task, int64_t chunk, int tile, Visit visit) {
    const Axis &rows = task.z.rows, &columns = task.z.columns;
    const bool is_up = task.upsampled && !task.labels;  // labels have the resolution of the result
    const int64_t first = is_up ? first_pixel(rows, chunk * task.chunk_size) : 0;
    const int64_t last = is_up ? first_pixel(rows, (chunk + 1) * task.chunk_size) : 1;
    const int64_t end = is_up ? columns.size : end_of(task, chunk);
    for (int64_t column = is_up ? 0 : begin_of(task, chunk); column < end; column += tile)
        for (int64_t row = first; row < last; row++) {
            int count = end - column < tile ? (int)(end - column) : tile;
            visit(row, column, count, row * columns.size + column);
        }
}

// Potentials ---------------------------------------------------------------------------------------

// Weighted potentials of a vector of pixels with logits x, in which classes are `tile` elements apart;
// if NEEDS_GRAD, gradients replace the logits. e: scratch of the same shape. G: coefficients of LINEAR.
template <int KIND, bool NEEDS_GRAD>
INLINE Reals weighted_potentials(const Task &task, real *x, real *e, int tile, Reals w, Integers y,
                                 const real *G) {
    const int64_t end = task.classes * tile;
    // In single precision q - 1 could be 0.
    const real q = (real)task.q, excess = (real)(task.q - 1), factor = 1 / excess;
    const real shift = (real)task.shift;
    Reals m = load(x), Z = Reals{}, total = Reals{};
    for (int64_t c = tile; c < end; c += tile) {
        Reals z = load(x + c);
        m = z > m ? z : m;
    }
    Integers index = Integers{};
    const real *g = G;
    for (int64_t c = 0; c < end; c += tile, index += 1) {
        Reals log_e = load(x + c) - m, exp_z = exponential(log_e);
        Z += exp_z;
        if (KIND == SQUARE) total += exp_z * exp_z;
        if (KIND == SHANNON) total += exp_z * at_least(log_e, LOG_TINY);
        if (KIND == CROSS_ENTROPY) total += index == y ? log_e : Reals{};
        if (KIND == LINEAR) total += exp_z * *g++;
        if (KIND == POWER || KIND == NEAR_ONE || NEEDS_GRAD) store(e + c, exp_z);
    }
    Reals scale = (real)1 / Z, log_Z = KIND == SQUARE || KIND == LINEAR ? Z : logarithm(Z);
    if (KIND == SQUARE) total *= scale * scale;
    if (KIND == SHANNON) total = total * scale - log_Z;
    if (KIND == CROSS_ENTROPY) total -= log_Z;
    if (KIND == LINEAR) total *= scale;
    if (KIND == POWER || KIND == NEAR_ONE)
        for (int64_t c = 0; c < end; c += tile) {
            Reals p = load(e + c) * scale, log_p = load(x + c) - m - log_Z, t;
            if (KIND == POWER) t = p * exponential(excess * log_p) * shift;
            if (KIND == NEAR_ONE) {
                t = p * exponential_less_1(excess * at_least(log_p, LOG_TINY)) * factor;
                // p underflows earlier than p^q.
                if (excess < 0) t = p < TINY ? exponential(q * log_p) * factor : t;
            }
            total += t;
            store(x + c, t);
        }
    if (NEEDS_GRAD) {
        index = Integers{}, g = G;
        for (int64_t c = 0; c < end; c += tile, index += 1) {
            Reals p = load(e + c) * scale, grad;
            if (KIND == SQUARE) grad = p * (total - p) * (real)2;
            if (KIND == SHANNON) grad = p * (total + log_Z - at_least(load(x + c) - m, LOG_TINY));
            if (KIND == POWER || KIND == NEAR_ONE) grad = q * (p * total - load(x + c));
            if (KIND == CROSS_ENTROPY) grad = index == y ? p - (real)1 : p;
            if (KIND == LINEAR) grad = p * (*g++ - total);
            // A coefficient may be NaN.
            if (KIND == LINEAR) grad = w == 0 ? Reals{} : grad;
            store(x + c, KIND == LINEAR ? grad : w * grad);
        }
    }
    if (KIND == LINEAR) return w == 0 ? Reals{} : total;
    return KIND == CROSS_ENTROPY ? -w * total : w * ((real)task.constant - total);
}

static int tile_of(const Task &task) {
    // The up to six arrays of a tile fit into the first-level cache, or almost do.
    return GROUP * (task.classes <= 8 ? 16 : task.classes <= 40 ? 4 : task.classes <= 80 ? 2 : 1);
}

// Weights and classes of a tile's pixels.
struct PixelWeights {
    const Task &task;
    const int tile;
    real *w, *by_index;
    integer *y;

    static int64_t bytes(const Task &task, int tile) {
        return 3 * 64 + (2 * tile + task.classes + 2) * (int64_t)sizeof(real);
    }

    PixelWeights(const Task &task, int tile, Scratch &scratch) : task(task), tile(tile) {
        if (!scratch.memory) return;
        w = scratch.take<real>(tile);
        y = scratch.take<integer>(tile);
        by_index = scratch.take<real>(task.classes + 2);
    }

    // Weights of image n by index: 0 for -1, NaN for an undefined class. All pixels have weight 1 in
    // class_sums, which has no weights, and for LINEAR, whose weights are coefficients of classes.
    void start_image(int64_t n) {
        const bool all_1 = !task.weights || task.kind == LINEAR;
        const real *weights = (const real *)task.weights + n * (task.by_class ? task.classes : 1);
        by_index[0] = 0;
        for (int64_t c = 0; c < task.classes; c++)
            by_index[c + 1] = all_1 ? 1 : weights[task.by_class ? c : 0];
        by_index[task.classes + 1] = (real)__builtin_nan("");
    }

    // The logits x of a pixel that does not count become 0.
    OUTLINE void read(int64_t n, int64_t pixel, int count, real *x) {
        const int64_t at = n * task.length + pixel;
        if (!task.y && !task.valid) {
            for (int k = 0; k < tile; k++) w[k] = k < count ? by_index[1] : 0;
            return;
        }
        for (int k = count; k < tile; k++) y[k] = -1;
        if (!task.y)
            for (int k = 0; k < count; k++) y[k] = 0;
        else if (task.wide_index)
            for (int k = 0; k < count; k++) y[k] = ((const int32_t *)task.y)[at + k];
        else
            for (int k = 0; k < count; k++) y[k] = ((const int8_t *)task.y)[at + k];
        if (task.valid)
            for (int k = 0; k < count; k++) y[k] = task.valid[at + k] ? y[k] : -1;
        integer least = 0;
        for (int k = 0; k < tile; k++) {
            w[k] = by_index[y[k] + 1];
            least = y[k] < least ? y[k] : least;
        }
        if (least == 0) return;
        for (int64_t c = 0; c < task.channels; c++)
            for (int k = 0; k < tile; k++) x[c * tile + k] = y[k] < 0 ? 0 : x[c * tile + k];
    }
};

template <int KIND, bool NEEDS_GRAD> struct WeightedSum {
    const Task &task;
    Progress &progress;
    const int tile;
    double *const partial_sums;
    real *const partial_grads;  // for each chunk, the source row that it shares with the next
    Scratch scratch;
    Reader z;
    PixelWeights weights;
    real *x, *e;
    real *upper, *lower;  // gradients of the source rows above and below

    WeightedSum(const Task &task, Progress &progress)
        : task(task), progress(progress), tile(tile_of(task)), partial_sums((double *)(&progress + 1)),
          partial_grads((real *)(partial_sums + task.images * task.chunks)),
          scratch(4 * 64 + 4 * task.classes * tile * (int64_t)sizeof(real) +
                  Reader::bytes(task, task.z, tile) + PixelWeights::bytes(task, tile)),
          z(task, progress, task.z, tile, scratch), weights(task, tile, scratch) {
        if (!scratch.memory) return;
        x = scratch.take<real>(task.classes * tile);
        e = scratch.take<real>(task.classes * tile);
        upper = scratch.take<real>(task.classes * tile);
        lower = scratch.take<real>(task.classes * tile);
    }

    bool run() {
        if (!scratch.memory) return false;
        const bool has_cells = NEEDS_GRAD && task.upsampled;
        if (for_chunks(task, progress, [&](int64_t n, int64_t chunk) {
                weights.start_image(n);
                partial_sums[n * task.chunks + chunk] = has_cells ? cells(n, chunk) : tiles(n, chunk);
            }))
            finish();
        return true;
    }

    double tiles(int64_t n, int64_t chunk) {
        double sum = 0;
        for_tiles(task, chunk, tile, [&](int64_t row, int64_t column, int count, int64_t pixel) {
            z.read(n, row, column, count, x);
            sum += tile_sum(n, pixel, count);
            if (NEEDS_GRAD) write_grads(task, n, pixel, count, tile, x);
        });
        return sum;
    }

    double cells(int64_t n, int64_t chunk) {
        const Axis &rows = task.z.rows, &columns = task.z.columns;
        const int64_t begin = chunk * task.chunk_size, end = begin + task.chunk_size;
        const int64_t plane = rows.source * columns.source, values = task.channels * tile;
        real *grad = (real *)task.grad.data + n * task.channels * plane;
        real *shared = partial_grads + (n * task.chunks + chunk) * task.channels * columns.source;
        for (int64_t c = 0; c < task.channels; c++)
            for (int64_t i = begin; i < end && i < rows.source; i++)
                memset(grad + c * plane + i * columns.source, 0, columns.source * sizeof(real));
        double sum = 0;
        for (int64_t column = 0; column < columns.size; column += tile) {
            int count = columns.size - column < tile ? (int)(columns.size - column) : tile;
            for (int64_t i = begin; i < end && i < rows.source; i++) {
                int64_t row = first_pixel(rows, i), last = first_pixel(rows, i + 1);
                if (row == last) continue;
                memset(upper, 0, values * sizeof(real));
                memset(lower, 0, values * sizeof(real));
                for (; row < last; row++) {
                    real down = z.read(n, row, column, count, x), up = 1 - down;
                    sum += tile_sum(n, row * columns.size + column, count);
                    for (int64_t k = 0; k < values; k++) {
                        upper[k] += up * x[k];
                        lower[k] += down * x[k];
                    }
                }
                z.add_grads(upper, column, count, grad + i * columns.source, plane);
                // The last source row has no row below.
                if (i + 1 == rows.source) continue;
                if (i + 1 == end)
                    z.add_grads(lower, column, count, shared, columns.source);
                else
                    z.add_grads(lower, column, count, grad + (i + 1) * columns.source, plane);
            }
        }
        return sum;
    }

    // The sum over a tile with logits x, which gradients replace.
    double tile_sum(int64_t n, int64_t pixel, int count) {
        const real *G = (const real *)task.weights + n * task.classes;
        if (task.classes > task.channels) memset(x + tile, 0, tile * sizeof(real));
        weights.read(n, pixel, count, x);
        Reals sums[GROUP / LANES] = {};
        for (int begin = 0; begin < count; begin += GROUP)
            for (int i = 0, k = begin; i < GROUP / LANES; i++, k += LANES)
                sums[i] += weighted_potentials<KIND, NEEDS_GRAD>(
                    task, x + k, e + k, tile, load(weights.w + k), load(weights.y + k), G);
        double total = 0;
        for (Reals sum : sums)
            for (int lane = 0; lane < LANES; lane++) total += (double)sum[lane];
        return total;
    }

    void finish() {
        for (int64_t n = 0; n < task.images; n++) {
            double sum = 0;
            for (int64_t chunk = 0; chunk < task.chunks; chunk++)
                sum += partial_sums[n * task.chunks + chunk];
            ((real *)task.result)[n] = (real)sum;
            if (NEEDS_GRAD && task.upsampled) finish_grads(n);
        }
    }

    void finish_grads(int64_t n) {
        const int64_t rows = task.z.rows.source, columns = task.z.columns.source;
        real *grad = (real *)task.grad.data + n * task.channels * rows * columns;
        const real *shared = partial_grads + n * task.chunks * task.channels * columns;
        for (int64_t chunk = 0; chunk < task.chunks; chunk++)
            for (int64_t c = 0, row = (chunk + 1) * task.chunk_size; c < task.channels; c++)
                for (int64_t j = 0; j < columns; j++, shared++)
                    if (row < rows) grad[(c * rows + row) * columns + j] += *shared;
        if (!progress.has_clamped) return;
        // The gradient of a clamped logit is 0.
        with_type(task.dtype, task.z.data, [&](auto *data) {
            const int64_t *stride = task.z.stride;
            for (int64_t c = 0; c < task.channels; c++)
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < columns; j++) {
                        real z = data[n * stride[0] + c * stride[1] + i * stride[3] + j * stride[4]];
                        if (z < LOWEST_LOGIT) grad[(c * rows + i) * columns + j] = 0;
                    }
        });
    }
};

// Probabilities ------------------------------------------------------------------------------------

// Returns Z, and replaces the logits with their exponentials.
INLINE Reals exponentials(const Task &task, real *x, int tile) {
    const int64_t end = task.classes * tile;
    Reals m = load(x), Z = Reals{};
    for (int64_t c = tile; c < end; c += tile) {
        Reals z = load(x + c);
        m = z > m ? z : m;
    }
    for (int64_t c = 0; c < end; c += tile) {
        Reals exp_z = exponential(load(x + c) - m);
        Z += exp_z;
        store(x + c, exp_z);
    }
    return Z;
}

struct ClassSums {
    const Task &task;
    Progress &progress;
    const int tile;
    double *const partial_sums;
    Scratch scratch;
    Reader z;
    PixelWeights weights;
    real *x;
    double *sums;  // (classes, LANES)

    ClassSums(const Task &task, Progress &progress)
        : task(task), progress(progress), tile(tile_of(task)), partial_sums((double *)(&progress + 1)),
          scratch(2 * 64 + task.classes * (tile * (int64_t)sizeof(real) + LANES * (int64_t)sizeof(double)) +
                  Reader::bytes(task, task.z, tile) + PixelWeights::bytes(task, tile)),
          z(task, progress, task.z, tile, scratch), weights(task, tile, scratch) {
        if (!scratch.memory) return;
        x = scratch.take<real>(task.classes * tile);
        sums = scratch.take<double>(task.classes * LANES);
    }

    bool run() {
        if (!scratch.memory) return false;
        if (for_chunks(task, progress, [&](int64_t n, int64_t chunk) { tiles(n, chunk); })) finish();
        return true;
    }

    void tiles(int64_t n, int64_t chunk) {
        memset(sums, 0, task.classes * LANES * sizeof(double));
        weights.start_image(n);
        for_tiles(task, chunk, tile, [&](int64_t row, int64_t column, int count, int64_t pixel) {
            z.read(n, row, column, count, x);
            if (task.classes > task.channels) memset(x + tile, 0, tile * sizeof(real));
            weights.read(n, pixel, count, x);
            add_tile(count);
        });
        double *partial = partial_sums + (n * task.chunks + chunk) * task.classes;
        for (int64_t c = 0; c < task.classes; c++) {
            partial[c] = 0;
            for (int lane = 0; lane < LANES; lane++) partial[c] += sums[c * LANES + lane];
        }
    }

    // A tile is summed in float32, the tiles in float64.
    OUTLINE void add_tile(int count) {
        for (int k = 0; k < count; k += LANES)
            store(weights.w + k, load(weights.w + k) / exponentials(task, x + k, tile));
        for (int64_t c = 0; c < task.classes; c++) {
            Reals sum = Reals{};
            for (int k = 0; k < count; k += LANES) sum += load(x + c * tile + k) * load(weights.w + k);
            for (int lane = 0; lane < LANES; lane++) sums[c * LANES + lane] += (double)sum[lane];
        }
    }

    void finish() {
        for (int64_t n = 0; n < task.images; n++)
            for (int64_t c = 0; c < task.classes; c++) {
                double sum = 0;
                for (int64_t chunk = 0; chunk < task.chunks; chunk++)
                    sum += partial_sums[(n * task.chunks + chunk) * task.classes + c];
                ((real *)task.result)[n * task.classes + c] = (real)sum;
            }
    }
};

// The classes of a vector of pixels with logits x, and g of the guide: the first class with the
// largest (mean) probability, -1 where no head is sure, `classes` where a probability is NaN.
INLINE Integers predict(const Task &task, real *x, real *g, int tile) {
    Reals ratio = splat(1), best = splat(-__builtin_inff());
    Integers unsure = Integers{}, undefined = unsure, y = unsure, index = unsure;
    if (task.has_threshold) {
        // The largest probability of a head is exp(0) / Z.
        Reals Z = exponentials(task, x, tile);
        unsure = (real)1 / Z <= (real)task.threshold;
        if (task.guide.data) {
            Reals guide_Z = exponentials(task, g, tile);
            unsure &= (real)1 / guide_Z <= (real)task.threshold;
            ratio = Z / guide_Z;
        }
    }
    for (int64_t c = 0; c < task.classes * tile; c += tile, index += 1) {
        // Z times the sum of both probabilities. In a sum of two products, a fused multiply-add would
        // round only one of them, so that classes with equal means would not tie.
        Reals score = load(x + c);
        if (task.guide.data) score += load(g + c) * ratio;
        undefined |= score != score;
        Integers larger = score > best;
        best = larger ? score : best;
        y = larger ? index : y;
    }
    undefined |= best - best != Reals{};
    y = unsure ? Integers{} - 1 : y;
    return undefined ? Integers{} + (integer)task.classes : y;
}

struct Classify {
    const Task &task;
    Progress &progress;
    const int tile;
    const int64_t bins;
    int64_t *const partial_counts;
    Scratch scratch;
    Reader z, guide;
    real *x, *g;
    integer *y;
    int64_t *counts;  // counts of a chunk (TABLES, 1 + bins); the first bin is for -1

    // Neighbouring pixels count in different tables, so that no count waits for the previous one.
    static const int TABLES = 4;

    Classify(const Task &task, Progress &progress)
        : task(task), progress(progress), tile(tile_of(task)), bins(task.classes + 1),
          partial_counts((int64_t *)(&progress + 1)),
          scratch(4 * 64 + (2 * task.classes + 1) * tile * (int64_t)sizeof(real) +
                  TABLES * (1 + bins) * (int64_t)sizeof(int64_t) +
                  Reader::bytes(task, task.z, tile) + Reader::bytes(task, task.guide, tile)),
          z(task, progress, task.z, tile, scratch), guide(task, progress, task.guide, tile, scratch) {
        if (!scratch.memory) return;
        x = scratch.take<real>(task.classes * tile);
        g = scratch.take<real>(task.classes * tile);
        y = scratch.take<integer>(tile);
        counts = scratch.take<int64_t>(TABLES * (1 + bins));
    }

    bool run() {
        if (!scratch.memory) return false;
        if (for_chunks(task, progress, [&](int64_t n, int64_t chunk) { tiles(n, chunk); })) finish();
        return true;
    }

    void tiles(int64_t n, int64_t chunk) {
        memset(counts, 0, TABLES * (1 + bins) * sizeof(int64_t));
        for_tiles(task, chunk, tile, [&](int64_t row, int64_t column, int count, int64_t pixel) {
            if (task.labels)
                read_labels(n * task.length + pixel, count);
            else
                predict_tile(n, row, column, count);
            write(n * task.length + pixel, count);
        });
        int64_t *partial = partial_counts + (n * task.chunks + chunk) * bins;
        for (int table = 0; table < TABLES; table++)
            for (int64_t bin = 0; bin < bins; bin++) partial[bin] += counts[table * (1 + bins) + 1 + bin];
    }

    OUTLINE void read_labels(int64_t at, int count) {
        with_integers(task.label_dtype, task.labels, [&](auto *labels) {
            for (int k = 0; k < count; k++) {
                int64_t label = labels[at + k];
                bool is_known = label >= 0 && label < task.classes;
                bool is_ignored = label == -1 || label == task.ignore_index;
                y[k] = (integer)(is_ignored ? -1 : is_known ? label : task.classes);
            }
        });
    }

    void predict_tile(int64_t n, int64_t row, int64_t column, int count) {
        z.read(n, row, column, count, x);
        if (task.guide.data) guide.read(n, row, column, count, g);
        if (task.classes > task.channels) {
            memset(x + tile, 0, tile * sizeof(real));
            memset(g + tile, 0, tile * sizeof(real));
        }
        for (int k = 0; k < count; k += LANES) store(y + k, predict(task, x + k, g + k, tile));
    }

    // Writes and counts the classes of pixels.
    OUTLINE void write(int64_t at, int count) {
        if (task.valid)
            for (int k = 0; k < count; k++) y[k] = task.valid[at + k] ? y[k] : -1;
        if (task.wide_index)
            for (int k = 0; k < count; k++) ((int32_t *)task.y)[at + k] = (int32_t)y[k];
        else
            for (int k = 0; k < count; k++) ((int8_t *)task.y)[at + k] = (int8_t)y[k];
        for (int k = 0; k < count; k++) counts[k % TABLES * (1 + bins) + 1 + y[k]]++;
    }

    void finish() {
        for (int64_t n = 0; n < task.images; n++)
            for (int64_t bin = 0; bin < bins; bin++) {
                int64_t count = 0;
                for (int64_t chunk = 0; chunk < task.chunks; chunk++)
                    count += partial_counts[(n * task.chunks + chunk) * bins + bin];
                ((int64_t *)task.result)[n * bins + bin] = count;
            }
    }
};

// Entry --------------------------------------------------------------------------------------------

// Every thread makes the same call with the same progress. It returns 0 if there is no memory for the
// scratch.

template <int KIND> static bool run_weighted_sum(const Task &task, Progress &progress) {
    return task.grad.data ? WeightedSum<KIND, true>(task, progress).run()
                          : WeightedSum<KIND, false>(task, progress).run();
}

EXPORT int weighted_sum(const Call *call, Progress *progress) {
    const Task task(*call);
    with_type(task.dtype, task.grad.data, [&](auto *grad) {
        use_large_pages(grad, task.upsampled ? 0 : task.images * task.channels * task.length * sizeof *grad);
    });
    switch (task.kind) {
        case SQUARE: return run_weighted_sum<SQUARE>(task, *progress);
        case SHANNON: return run_weighted_sum<SHANNON>(task, *progress);
        case POWER: return run_weighted_sum<POWER>(task, *progress);
        case NEAR_ONE: return run_weighted_sum<NEAR_ONE>(task, *progress);
        case CROSS_ENTROPY: return run_weighted_sum<CROSS_ENTROPY>(task, *progress);
        default: return run_weighted_sum<LINEAR>(task, *progress);
    }
}
EXPORT int class_sums(const Call *call, Progress *progress) {
    return ClassSums(Task(*call), *progress).run();
}
EXPORT int classify(const Call *call, Progress *progress) {
    const Task task(*call);
    use_large_pages(task.y, task.images * task.length * (task.wide_index ? 4 : 1));
    return Classify(task, *progress).run();
}

// out = grad[n] * factors[n], in the dtype of the logits.
EXPORT void scale_grad(int dtype, int64_t images, int64_t size, real *grad, real *factors, void *out) {
    with_type(dtype, out, [&](auto *to) {
        for (int64_t n = 0; n < images; n++)
            for (int64_t k = n * size; k < (n + 1) * size; k++) assign(to[k], grad[k] * factors[n]);
    });
}
