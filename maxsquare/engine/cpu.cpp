// The two operators on CPUs, for logits of half and single precision, or (DOUBLE) of double.
//
// A tile of neighbouring pixels with all its classes stays in the first cache. Upsampled logits
// exist only there: the low-resolution rows above and below a tile are interpolated along the row
// once, and mixed for each row of pixels between them. The slope returns the same way: it is added
// up over those rows of pixels before it is spread over the low-resolution columns.
//
// Work is cut into chunks that do not depend on the number of threads. Each chunk writes to places
// of its own, and `finish` adds those in order, so that every number of threads gives the same bits.
// A thread takes the next chunk from a counter: one that is interrupted delays nobody.
//
// The letters are those of potentials.py: p = exp(z - m) / Z, t = p L(p).

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Shared with cpu.py -------------------------------------------------------------------------------

enum Dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, UINT8, INT8, INT16, INT32, INT64 };
// As in potentials.py.
enum Kind { SQUARE, SHANNON, POWER, NEAR_ONE, LABEL };

// Pixel k of an axis lies at source position (k * scale + offset) / unit.
struct Axis {
    int64_t scale, offset, unit, source, size;
};

// Logits (N, C, *spatial). Strides in elements: of images, channels, three spatial dimensions.
struct Head {
    void *data;
    int64_t stride[5];
    Axis rows, columns;
};

struct Task {
    Head z, guide, slope;  // data: NULL where there is none; an upsampled slope is contiguous
    const void *labels;    // of any integer dtype
    const uint8_t *valid;
    void *y;               // written by classify, read by weighted_sum
    const void *weights;   // (N, C) or (N, 1)
    double *partial_sums;  // of each chunk
    int64_t *partial_counts;
    void *partial_slopes;  // of each chunk: the row that it shares with the next
    void *sums;            // (N,)
    int64_t *counts;       // (N, C + 1); the last bin: no class
    int64_t images, classes, channels, length, shape[3];
    int64_t chunks, chunk_size;  // of an image; pixels, or rows of cells, of a chunk
    int64_t next;  // chunk that nobody has taken
    int64_t ignore_index;
    double q, shift, constant, threshold;
    int32_t dtype, label_dtype, wide_index, kind, upsampled, flat, by_class, has_threshold;
    int32_t held;  // whether any logit is below the lowest one
};

// Vectors ------------------------------------------------------------------------------------------

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))

#ifdef DOUBLE
typedef double real;
typedef int64_t integer;
typedef uint64_t word;
static const int LANES = 8, MANTISSA = 52, BIAS = 1023, LOG_TERMS = 11, EXPM1_TERMS = 16;
static const word ROOT_HALF = 0x3fe6a09e667f3bcd;
static const real ROUND = 6755399441055744 + BIAS, TINY = 2.2250738585072014e-308;
static const real LOG_TINY = -708.3964185322641;
// log 2 in two parts, the first with so few digits that its multiples are exact.
static const real LOG_2 = 0.6931471805592082, LOG_2_REST = 7.371002565167799e-13;
#else
typedef float real;
typedef int32_t integer;
typedef uint32_t word;
static const int LANES = 16, MANTISSA = 23, BIAS = 127, LOG_TERMS = 5, EXPM1_TERMS = 9;
static const word ROOT_HALF = 0x3f3504f3;
static const real ROUND = 12582912 + BIAS, TINY = 1.17549435e-38f, LOG_TINY = -87.336545f;
static const real LOG_2 = 0.693359375f, LOG_2_REST = -0.00021219444f;
#endif

typedef real Reals __attribute__((vector_size(64)));
typedef integer Integers __attribute__((vector_size(64)));
typedef word Words __attribute__((vector_size(64)));  // whose overflow is defined

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
INLINE Reals splat(real x) { return Reals{} + x; }
INLINE Reals at_least(Reals x, real least) { return x < least ? splat(least) : x; }

// 0 below the logarithm of the least normal number, NaN for NaN; x is below that of the largest.
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
    // The low digits of `shifted` are those of n + BIAS, the exponent of 2^n. To add n to that of y
    // would be as fast, but would make a number of a NaN that has low digits.
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

// exp(u) - 1, by its series where the difference would lose digits.
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
        // Beside 0.5 the last digit of a float32 is that of the smallest numbers: 2^-24.
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

// Calls visit with the data as a pointer of its type.
template <class Visit> INLINE void with_type(int dtype, void *data, Visit visit) {
#ifndef DOUBLE
    if (dtype == BFLOAT16) return visit((BFloat16 *)data);
    if (dtype == FLOAT16) return visit((Float16 *)data);
#endif
    visit((real *)data);
}

static int64_t integer_at(int dtype, const void *data, int64_t k) {
    switch (dtype) {
        case UINT8: return ((const uint8_t *)data)[k];
        case INT8: return ((const int8_t *)data)[k];
        case INT16: return ((const int16_t *)data)[k];
        case INT32: return ((const int32_t *)data)[k];
        default: return ((const int64_t *)data)[k];
    }
}

// Chunks -------------------------------------------------------------------------------------------

static int64_t begin_of(const Task &task, int64_t chunk) { return chunk * task.chunk_size; }
// Of chunks of pixels.
static int64_t end_of(const Task &task, int64_t chunk) {
    int64_t end = (chunk + 1) * task.chunk_size;
    return end < task.length ? end : task.length;
}

// Calls visit(image, chunk of it) for the chunks that no other thread has taken.
template <class Visit> static void for_chunks(Task &task, Visit visit) {
    for (;;) {
        int64_t chunk = __atomic_fetch_add(&task.next, 1, __ATOMIC_RELAXED);
        if (chunk >= task.images * task.chunks) return;
        visit(chunk / task.chunks, chunk % task.chunks);
    }
}

// Upsampling ---------------------------------------------------------------------------------------

// Stands for -inf, a class that is masked out, where logits are interpolated: 0 times -inf is NaN.
static const real LOWEST_LOGIT = (real)-1e30;

static int64_t low_of(const Axis &axis, int64_t k) {
    int64_t numerator = k * axis.scale + axis.offset;
    int64_t low = numerator > 0 ? numerator / axis.unit : 0;
    return low < axis.source - 1 ? low : axis.source - 1;
}

// How much of the next source row (column) pixel k has; the last one has none beside it.
static real share_of(const Axis &axis, int64_t k, int64_t low) {
    int64_t rest = k * axis.scale + axis.offset - low * axis.unit;
    return rest > 0 && low < axis.source - 1 ? (real)((double)rest / (double)axis.unit) : 0;
}

// The first pixel at source position i or beyond.
static int64_t first_of(const Axis &axis, int64_t i) {
    if (i <= 0) return 0;
    if (i >= axis.source) return axis.size;
    int64_t first = (i * axis.unit - axis.offset + axis.scale - 1) / axis.scale;
    return first < axis.size ? first : axis.size;
}

// The memory of a thread, from which arrays are taken one after the other.
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

// An upsampled head as a tile of pixels sees it.
struct Upsampling {
    Task &task;
    const Head &head;
    const int tile;
    int64_t cell_row = -1;
    int32_t *low;        // of all columns of the result
    real *share;         // likewise
    real *source;        // a source row
    real *top, *bottom;  // (channels, tile): the source rows around, interpolated along the row

    static int64_t bytes(const Task &task, const Head &head, int tile) {
        int64_t reals = head.columns.size + head.columns.source + 1 + 2 * task.channels * tile;
        return 5 * 64 + head.columns.size * sizeof(int32_t) + reals * sizeof(real);
    }

    Upsampling(Task &task, const Head &head, int tile, Scratch &scratch)
        : task(task), head(head), tile(tile) {
        low = scratch.take<int32_t>(head.columns.size);
        share = scratch.take<real>(head.columns.size);
        source = scratch.take<real>(head.columns.source + 1);
        top = scratch.take<real>(task.channels * tile);
        bottom = scratch.take<real>(task.channels * tile);
        for (int64_t k = 0; k < head.columns.size; k++) {
            low[k] = (int32_t)low_of(head.columns, k);
            share[k] = share_of(head.columns, k, low[k]);
        }
    }

    // Logits of `count` pixels of a row into x (classes, tile); the share of the lower source row.
    OUTLINE real read(int64_t n, int64_t row, int64_t column, int count, real *x) {
        int64_t i = low_of(head.rows, row);
        if (i == cell_row + 1 && cell_row >= 0) {
            real *spare = top;
            top = bottom;
            bottom = spare;
        } else if (i != cell_row) {
            read_source(n, i, column, count, top);
        }
        if (i != cell_row) read_source(n, i + 1 < head.rows.source ? i + 1 : i, column, count, bottom);
        cell_row = i;
        real down = share_of(head.rows, row, i);
        for (int64_t k = 0; k < task.channels * tile; k++) x[k] = (1 - down) * top[k] + down * bottom[k];
        return down;
    }

    // Source row i, interpolated to `count` columns of the result.
    OUTLINE void read_source(int64_t n, int64_t i, int64_t column, int count, real *out) {
        int64_t begin = low[column], end = low[column + count - 1] + 2;
        end = end < head.columns.source ? end : head.columns.source;
        with_type(task.dtype, head.data, [&](auto *data) {
            for (int64_t c = 0; c < task.channels; c++, out += tile) {
                auto *row = data + n * head.stride[0] + c * head.stride[1] + i * head.stride[3];
                int32_t held = 0;
                for (int64_t j = begin; j < end; j++) {
                    real z = row[j * head.stride[4]];
                    held |= z < LOWEST_LOGIT;
                    source[j] = z < LOWEST_LOGIT ? LOWEST_LOGIT : z;
                }
                if (held) __atomic_store_n(&task.held, 1, __ATOMIC_RELAXED);
                source[end] = source[end - 1];
                for (int k = 0; k < count; k++) {
                    const real *left = source + low[column + k], right = share[column + k];
                    out[k] = (1 - right) * left[0] + right * left[1];
                }
                for (int k = count; k < tile; k++) out[k] = 0;
            }
        });
    }

    // Adds the slopes of a tile's pixels to a source row, (channels, columns) with this stride.
    OUTLINE void add(const real *slopes, int64_t column, int count, real *row, int64_t stride) {
        for (int64_t c = 0; c < task.channels; c++, slopes += tile, row += stride)
            for (int k = 0; k < count;) {
                int32_t j = low[column + k];
                real left = 0, right = 0;
                for (; k < count && low[column + k] == j; k++) {
                    left += slopes[k] * (1 - share[column + k]);
                    right += slopes[k] * share[column + k];
                }
                row[j] += left;
                if (j + 1 < head.columns.source) row[j + 1] += right;
            }
    }
};

// Full resolution ----------------------------------------------------------------------------------

// Calls visit(x[c * tile + k], element) for the pixels of a tile, in the order of their memory.
template <class T, class Visit>
INLINE void visit_tile(const Task &task, const Head &head, T *data, int64_t n, int64_t pixel,
                       int count, int tile, real *x, Visit visit) {
    const int64_t *shape = task.shape, *stride = head.stride;
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

OUTLINE static void read_pixels(const Task &task, const Head &head, int64_t n, int64_t pixel, int count,
                        int tile, real *x) {
    with_type(task.dtype, head.data, [&](auto *data) {
        visit_tile(task, head, data, n, pixel, count, tile, x, [](real &x, auto &z) { x = z; });
    });
    if (count < tile)
        for (int64_t c = 0; c < task.channels; c++)
            memset(x + c * tile + count, 0, (tile - count) * sizeof(real));
}

OUTLINE static void write_pixels(const Task &task, int64_t n, int64_t pixel, int count, int tile, real *x) {
    with_type(task.dtype, task.slope.data, [&](auto *data) {
        visit_tile(task, task.slope, data, n, pixel, count, tile, x,
                   [](real &x, auto &slope) { assign(slope, x); });
    });
}

// Potentials ---------------------------------------------------------------------------------------

// Weighted potentials of a vector of pixels with logits at x, a class every `tile`; if SLOPED,
// their slopes take the place of the logits. e: scratch of the same form.
template <int KIND, bool SLOPED>
INLINE Reals weighted_potentials(const Task &task, real *x, real *e, int tile, Reals w, Integers y) {
    const int64_t end = task.classes * tile;
    // Of q itself single precision may have lost all that tells it from 1.
    const real q = (real)task.q, excess = (real)(task.q - 1), factor = 1 / excess;
    const real shift = (real)task.shift;
    Reals m = load(x), Z = Reals{}, total = Reals{};
    for (int64_t c = tile; c < end; c += tile) {
        Reals z = load(x + c);
        m = z > m ? z : m;
    }
    Integers index = Integers{};
    for (int64_t c = 0; c < end; c += tile, index += 1) {
        Reals log_e = load(x + c) - m, exp_z = exponential(log_e);
        Z += exp_z;
        if (KIND == SQUARE) total += exp_z * exp_z;
        if (KIND == SHANNON) total += exp_z * at_least(log_e, LOG_TINY);
        if (KIND == LABEL) total += index == y ? log_e : Reals{};
        if (KIND >= POWER || SLOPED) store(e + c, exp_z);
    }
    Reals scale = (real)1 / Z, log_Z = KIND == SQUARE ? Z : logarithm(Z);
    if (KIND == SQUARE) total *= scale * scale;
    if (KIND == SHANNON) total = total * scale - log_Z;
    if (KIND == LABEL) total -= log_Z;
    if (KIND == POWER || KIND == NEAR_ONE)
        for (int64_t c = 0; c < end; c += tile) {
            Reals p = load(e + c) * scale, log_p = load(x + c) - m - log_Z, t;
            if (KIND == POWER) t = p * exponential(excess * log_p) * shift;
            if (KIND == NEAR_ONE) {
                t = p * exponential_less_1(excess * at_least(log_p, LOG_TINY)) * factor;
                // Where p has been rounded away, p^q is still something.
                if (excess < 0) t = p < TINY ? exponential(q * log_p) * factor : t;
            }
            total += t;
            store(x + c, t);
        }
    if (SLOPED) {
        index = Integers{};
        for (int64_t c = 0; c < end; c += tile, index += 1) {
            Reals p = load(e + c) * scale, slope;
            if (KIND == SQUARE) slope = p * (total - p) * (real)2;
            if (KIND == SHANNON) slope = p * (total + log_Z - at_least(load(x + c) - m, LOG_TINY));
            if (KIND == POWER || KIND == NEAR_ONE) slope = q * (p * total - load(x + c));
            if (KIND == LABEL) slope = index == y ? p - (real)1 : p;
            store(x + c, w * slope);
        }
    }
    return KIND == LABEL ? -w * total : w * ((real)task.constant - total);
}

static int tile_of(const Task &task) {
    // What a tile holds in up to six arrays stays in the first cache, or not far beyond.
    return task.classes <= 8 ? 16 * LANES : task.classes <= 40 ? 4 * LANES : task.classes <= 80 ? 2 * LANES : LANES;
}

template <int KIND, bool SLOPED> struct WeightedSum {
    Task &task;
    const int tile;
    Scratch scratch;
    real *x, *e, *w, *by_index;
    real *upper, *lower;  // slopes of the source rows around
    integer *y;

    explicit WeightedSum(Task &task)
        : task(task), tile(tile_of(task)),
          scratch(8 * 64 + ((4 * task.classes + 2) * tile + task.classes + 2) * (int64_t)sizeof(real) +
                  (task.upsampled ? Upsampling::bytes(task, task.z, tile) : 0)) {
        if (!scratch.memory) return;
        x = scratch.take<real>(task.classes * tile);
        e = scratch.take<real>(task.classes * tile);
        upper = scratch.take<real>(task.classes * tile);
        lower = scratch.take<real>(task.classes * tile);
        w = scratch.take<real>(tile);
        y = scratch.take<integer>(tile);
        by_index = scratch.take<real>(task.classes + 2);
    }

    bool run() {
        if (!scratch.memory) return false;
        if (!task.upsampled) {
            for_chunks(task, [&](int64_t n, int64_t chunk) {
                task.partial_sums[n * task.chunks + chunk] = pixels(n, chunk);
            });
            return true;
        }
        Upsampling z(task, task.z, tile, scratch);
        for_chunks(task, [&](int64_t n, int64_t chunk) {
            task.partial_sums[n * task.chunks + chunk] = cells(n, chunk, z);
        });
        return true;
    }

    double pixels(int64_t n, int64_t chunk) {
        double sum = 0;
        start_image(n);
        for (int64_t pixel = begin_of(task, chunk); pixel < end_of(task, chunk); pixel += tile) {
            int64_t left = end_of(task, chunk) - pixel;
            int count = left < tile ? (int)left : tile;
            read_pixels(task, task.z, n, pixel, count, tile, x);
            sum += tile_sum(n, pixel, count);
            if (SLOPED) write_pixels(task, n, pixel, count, tile, x);
        }
        return sum;
    }

    double cells(int64_t n, int64_t chunk, Upsampling &z) {
        const Axis &rows = task.z.rows, &columns = task.z.columns;
        const int64_t begin = chunk * task.chunk_size, end = begin + task.chunk_size;
        const int64_t plane = rows.source * columns.source, values = task.channels * tile;
        real *slope = (real *)task.slope.data + n * task.channels * plane, *shared = NULL;
        if (SLOPED) {
            shared = (real *)task.partial_slopes +
                     (n * task.chunks + chunk) * task.channels * columns.source;
            memset(shared, 0, task.channels * columns.source * sizeof(real));
            for (int64_t c = 0; c < task.channels; c++)
                for (int64_t i = begin; i < end && i < rows.source; i++)
                    memset(slope + c * plane + i * columns.source, 0, columns.source * sizeof(real));
        }
        double sum = 0;
        start_image(n);
        for (int64_t column = 0; column < columns.size; column += tile) {
            int count = columns.size - column < tile ? (int)(columns.size - column) : tile;
            z.cell_row = -1;
            for (int64_t i = begin; i < end && i < rows.source; i++) {
                int64_t row = first_of(rows, i), last = first_of(rows, i + 1);
                if (row == last) continue;
                if (SLOPED) memset(upper, 0, values * sizeof(real));
                if (SLOPED) memset(lower, 0, values * sizeof(real));
                for (; row < last; row++) {
                    real down = z.read(n, row, column, count, x), up = 1 - down;
                    sum += tile_sum(n, row * columns.size + column, count);
                    if (SLOPED)
                        for (int64_t k = 0; k < values; k++) {
                            upper[k] += up * x[k];
                            lower[k] += down * x[k];
                        }
                }
                if (!SLOPED) continue;
                z.add(upper, column, count, slope + i * columns.source, plane);
                // The last source row has none below it.
                if (i + 1 == rows.source) continue;
                if (i + 1 == end)
                    z.add(lower, column, count, shared, columns.source);
                else
                    z.add(lower, column, count, slope + (i + 1) * columns.source, plane);
            }
        }
        return sum;
    }

    // Sum over a tile whose logits are at x; their slopes take their place.
    double tile_sum(int64_t n, int64_t pixel, int count) {
        if (task.classes > task.channels) memset(x + tile, 0, tile * sizeof(real));
        prepare(n, pixel, count);
        Reals sum = Reals{};
        for (int k = 0; k < count; k += LANES)
            sum += weighted_potentials<KIND, SLOPED>(task, x + k, e + k, tile, load(w + k), load(y + k));
        double total = 0;
        for (int lane = 0; lane < LANES; lane++) total += (double)sum[lane];
        return total;
    }

    // Weights of image n by index: 0 for -1, NaN for what is no class.
    void start_image(int64_t n) {
        const real *weights = (const real *)task.weights + n * (task.by_class ? task.classes : 1);
        by_index[0] = 0;
        for (int64_t c = 0; c < task.classes; c++) by_index[c + 1] = weights[task.by_class ? c : 0];
        by_index[task.classes + 1] = (real)__builtin_nan("");
    }

    // Weights and indices of a tile's pixels. One that does not count gets logits of 0 whatever
    // they were.
    OUTLINE void prepare(int64_t n, int64_t pixel, int count) {
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

// Classes ------------------------------------------------------------------------------------------

// Z, and the exponentials in place of the logits.
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

// Classes of a vector of pixels with logits at x and, of the guide, at g: the first of those with the
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
        // Z times the sum of both probabilities. Of two products in a sum a fused multiply-add
        // rounds only one, so that classes whose means are equal would not tie.
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
    Task &task;
    const int tile;
    Scratch scratch;
    real *x, *g;

    explicit Classify(Task &task)
        : task(task), tile(tile_of(task)),
          scratch(2 * 64 + 2 * task.classes * tile * (int64_t)sizeof(real) +
                  (task.upsampled ? Upsampling::bytes(task, task.z, tile) +
                                        Upsampling::bytes(task, task.guide, tile)
                                  : 0)) {
        if (!scratch.memory) return;
        x = scratch.take<real>(task.classes * tile);
        g = scratch.take<real>(task.classes * tile);
    }

    bool run() {
        if (!scratch.memory) return false;
        if (task.labels)
            for_chunks(task, [&](int64_t n, int64_t chunk) { labels(n, chunk); });
        else if (!task.upsampled)
            for_chunks(task, [&](int64_t n, int64_t chunk) { pixels(n, chunk); });
        else {
            Upsampling z(task, task.z, tile, scratch), guide(task, task.guide, tile, scratch);
            for_chunks(task, [&](int64_t n, int64_t chunk) { cells(n, chunk, z, guide); });
        }
        return true;
    }

    void labels(int64_t n, int64_t chunk) {
        for (int64_t pixel = begin_of(task, chunk); pixel < end_of(task, chunk); pixel++) {
            int64_t label = integer_at(task.label_dtype, task.labels, n * task.length + pixel);
            if (label == task.ignore_index || label == -1)
                label = -1;
            else if (label < 0 || label > task.classes)
                label = task.classes;
            count(n, chunk, pixel, label);
        }
    }

    void pixels(int64_t n, int64_t chunk) {
        for (int64_t pixel = begin_of(task, chunk); pixel < end_of(task, chunk); pixel += tile) {
            int64_t left = end_of(task, chunk) - pixel;
            int count = left < tile ? (int)left : tile;
            read_pixels(task, task.z, n, pixel, count, tile, x);
            if (task.guide.data) read_pixels(task, task.guide, n, pixel, count, tile, g);
            tile_classes(n, chunk, pixel, count);
        }
    }

    void cells(int64_t n, int64_t chunk, Upsampling &z, Upsampling &guide) {
        const Axis &rows = task.z.rows, &columns = task.z.columns;
        int64_t first = first_of(rows, chunk * task.chunk_size);
        int64_t last = first_of(rows, (chunk + 1) * task.chunk_size);
        for (int64_t column = 0; column < columns.size; column += tile) {
            int64_t left = columns.size - column;
            int count = left < tile ? (int)left : tile;
            z.cell_row = guide.cell_row = -1;
            for (int64_t row = first; row < last; row++) {
                z.read(n, row, column, count, x);
                if (task.guide.data) guide.read(n, row, column, count, g);
                tile_classes(n, chunk, row * columns.size + column, count);
            }
        }
    }

    void tile_classes(int64_t n, int64_t chunk, int64_t pixel, int count) {
        if (task.classes > task.channels) {
            memset(x + tile, 0, tile * sizeof(real));
            memset(g + tile, 0, tile * sizeof(real));
        }
        for (int k = 0; k < count; k += LANES) {
            Integers y = predict(task, x + k, g + k, tile);
            for (int lane = 0; lane < LANES && k + lane < count; lane++)
                this->count(n, chunk, pixel + k + lane, y[lane]);
        }
    }

    void count(int64_t n, int64_t chunk, int64_t pixel, int64_t y) {
        int64_t at = n * task.length + pixel;
        if (task.valid && !task.valid[at]) y = -1;
        if (y >= 0) task.partial_counts[(n * task.chunks + chunk) * (task.classes + 1) + y]++;
        if (task.wide_index)
            ((int32_t *)task.y)[at] = (int32_t)y;
        else
            ((int8_t *)task.y)[at] = (int8_t)y;
    }
};

// Entry --------------------------------------------------------------------------------------------

template <int KIND> static bool run_weighted_sum(Task &task) {
    return task.slope.data ? WeightedSum<KIND, true>(task).run() : WeightedSum<KIND, false>(task).run();
}

// What every thread calls with the same task; 0 if there is no memory for its scratch.
extern "C" int weighted_sum(Task *task) {
    switch (task->kind) {
        case SQUARE: return run_weighted_sum<SQUARE>(*task);
        case SHANNON: return run_weighted_sum<SHANNON>(*task);
        case POWER: return run_weighted_sum<POWER>(*task);
        case NEAR_ONE: return run_weighted_sum<NEAR_ONE>(*task);
        default: return run_weighted_sum<LABEL>(*task);
    }
}
extern "C" int classify(Task *task) { return Classify(*task).run(); }

// What one thread calls after all of them.
extern "C" void finish_weighted_sum(Task *t) {
    const Head &z = t->z;
    const int64_t rows = z.rows.source, columns = z.columns.source;
    for (int64_t n = 0; n < t->images; n++) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < t->chunks; chunk++) sum += t->partial_sums[n * t->chunks + chunk];
        ((real *)t->sums)[n] = (real)sum;
        if (!t->slope.data || !t->upsampled) continue;
        real *slope = (real *)t->slope.data + n * t->channels * rows * columns;
        const real *shared = (real *)t->partial_slopes + n * t->chunks * t->channels * columns;
        for (int64_t chunk = 0; chunk < t->chunks; chunk++)
            for (int64_t c = 0, row = (chunk + 1) * t->chunk_size; c < t->channels; c++)
                for (int64_t j = 0; j < columns; j++, shared++)
                    if (row < rows) slope[(c * rows + row) * columns + j] += *shared;
        // Where the logits are held at the lowest one the slope is 0.
        if (!t->held) continue;
        with_type(t->dtype, z.data, [&](auto *data) {
            for (int64_t c = 0; c < t->channels; c++)
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < columns; j++) {
                        real at = data[n * z.stride[0] + c * z.stride[1] + i * z.stride[3] + j * z.stride[4]];
                        if (at < LOWEST_LOGIT) slope[(c * rows + i) * columns + j] = 0;
                    }
        });
    }
}
extern "C" void finish_classify(Task *t) {
    const int64_t bins = t->classes + 1;
    for (int64_t n = 0; n < t->images; n++)
        for (int64_t bin = 0; bin < bins; bin++) {
            int64_t count = 0;
            for (int64_t chunk = 0; chunk < t->chunks; chunk++)
                count += t->partial_counts[(n * t->chunks + chunk) * bins + bin];
            t->counts[n * bins + bin] = count;
        }
}

// out = slope[n] * factors[n], in the dtype of the logits.
extern "C" void scale(int dtype, int64_t images, int64_t size, real *slope, real *factors, void *out) {
    with_type(dtype, out, [&](auto *to) {
        for (int64_t n = 0; n < images; n++)
            for (int64_t k = n * size; k < (n + 1) * size; k++) assign(to[k], slope[k] * factors[n]);
    });
}
