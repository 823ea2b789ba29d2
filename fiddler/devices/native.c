/* Few rows times many weights, all in bfloat16, at the speed at which memory hands out the weights.

   torch runs one parallel region per matrix and ends it with a barrier: of a small expert that barrier is most of the
   time. Here a region holds a whole layer's experts, cut into chunks that threads take as they come free, so a core
   that other programs slow down holds up nobody. A core asks memory for more when it follows several streams, and a
   stream that ends with every row never gets going: four rows of weights are read side by side, each walking through
   its own part of the chunk.

   A result depends on its row and its weights alone, never on how many rows or experts run beside it.
   Compiled by native.py for the machine it runs on. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define UNROLL _Pragma("GCC unroll 4") /* or the sums would live in memory */
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef int64_t integer;

enum { W = 4, X = 4 };                 /* A tile: rows of weights by rows of activations. */
enum { CHUNKS = 8, LEAST_BYTES = 1 << 15, MOST_BYTES = 1 << 20 }; /* For each thread, and their bytes of weights. */

typedef struct {
    const bf16 *gate, *up, *down; /* [inner, hidden] twice, [hidden, inner]; columns side by side */
    const bf16 *x;                /* [n_rows, hidden] without gaps */
    bf16 *y;                      /* [n_rows, hidden] without gaps */
    integer gate_stride, up_stride, down_stride, n_rows;
} expert;

INLINE float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE bf16 narrow(float value) { /* to nearest, ties to even; what is no number stays none */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* LANES values of a row as the machine multiplies them, or as many as are left, zeros behind them; sums of products. */
#if defined(__AVX512BF16__) && !defined(PORTABLE)
#include <immintrin.h>

enum { LANES = 32 };
typedef __m512bh values;
typedef __m512 sums;

INLINE values load(const bf16 *from) { return (values)_mm512_loadu_si512(from); }
INLINE values load_part(const bf16 *from, integer n) {
    return (values)_mm512_maskz_loadu_epi16(((__mmask32)1 << n) - 1, from);
}
INLINE sums add(sums so_far, values a, values b) { return _mm512_dpbf16_ps(so_far, a, b); }
INLINE float total(sums all) { return _mm512_reduce_add_ps(all); }
#else
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float values __attribute__((vector_size(LANES * 4)));
typedef values sums;
typedef bf16 halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));

INLINE values load(const bf16 *from) {
    halves loaded;
    memcpy(&loaded, from, sizeof loaded);
    return (values)(__builtin_convertvector(loaded, words) << 16);
}
INLINE values load_part(const bf16 *from, integer n) {
    bf16 padded[LANES] = {0};
    memcpy(padded, from, (size_t)n * sizeof *padded);
    return load(padded);
}
INLINE sums add(sums so_far, values a, values b) { return so_far + a * b; }
INLINE float total(sums all) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += all[i];
    return sum;
}
#endif

/* The dot products of W rows of weights with n_x <= X rows of activations. */
INLINE void dots(const bf16 *const w[W], const bf16 *x, integer columns, const int n_x, float out[W][X]) {
    sums all[W][X];
    values xs[X];
    integer at = 0;
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int j = 0; j < n_x; j++) all[i][j] = (sums){0};
    for (; at + LANES <= columns; at += LANES) {
        UNROLL for (int j = 0; j < n_x; j++) xs[j] = load(x + j * columns + at);
        UNROLL for (int i = 0; i < W; i++) {
            values ws = load(w[i] + at);
            UNROLL for (int j = 0; j < n_x; j++) all[i][j] = add(all[i][j], ws, xs[j]);
        }
    }
    if (at < columns) {
        UNROLL for (int j = 0; j < n_x; j++) xs[j] = load_part(x + j * columns + at, columns - at);
        UNROLL for (int i = 0; i < W; i++) {
            values ws = load_part(w[i] + at, columns - at);
            UNROLL for (int j = 0; j < n_x; j++) all[i][j] = add(all[i][j], ws, xs[j]);
        }
    }
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int j = 0; j < n_x; j++) out[i][j] = total(all[i][j]);
}

static void tile(const bf16 *const w[W], const bf16 *x, integer columns, integer n_x, float found[W][X]) {
    switch (n_x) { /* constants, so that each case keeps its sums in registers */
        case 1: dots(w, x, columns, 1, found); break;
        case 2: dots(w, x, columns, 2, found); break;
        case 3: dots(w, x, columns, 3, found); break;
        default: dots(w, x, columns, X, found);
    }
}

INLINE integer least(integer a, integer b) { return a < b ? a : b; }

/* Rows of weights to a chunk, of n matrices of so many rows that n_threads share. */
static integer chunk_rows(integer n, integer rows, integer columns, integer n_threads) {
    integer row_bytes = columns * (integer)sizeof(bf16), bytes = n * rows * row_bytes / (CHUNKS * n_threads);
    bytes = bytes < LEAST_BYTES ? LEAST_BYTES : least(bytes, MOST_BYTES);
    return (bytes / row_bytes + W) / W * W;
}

/* Rows start to stop of y = x wT (+ bias), of which y has out columns. */
static void multiply(const bf16 *w, integer stride, const bf16 *x, const bf16 *bias, bf16 *y, integer out,
                     integer columns, integer n_rows, integer start, integer stop) {
    integer part = (stop - start + W - 1) / W;
    for (integer step = 0; step < part; step++) {
        const bf16 *ws[W];
        integer rows[W];
        for (int i = 0; i < W; i++) {
            rows[i] = least(start + i * part + step, stop - 1);
            ws[i] = w + rows[i] * stride;
        }
        for (integer j = 0; j < n_rows; j += X) {
            float found[W][X];
            integer n_x = least(n_rows - j, X);
            tile(ws, x + j * columns, columns, n_x, found);
            for (int i = 0; i < W; i++)
                for (int k = 0; k < n_x; k++)
                    y[(j + k) * out + rows[i]] = narrow(found[i][k] + (bias ? widen(bias[rows[i]]) : 0.0f));
        }
    }
}

/* silu(gate) * up, rounded after each operation as the model rounds. */
INLINE bf16 gated(float gate, float up) {
    float g = widen(narrow(gate));
    return narrow(widen(narrow(g / (1.0f + expf(-g)))) * widen(narrow(up)));
}

/* Rows start to stop of the up half, [n_rows, inner]: two rows of the gate and two of up make a tile. */
static void rise(const expert *e, bf16 *middle, integer hidden, integer inner, integer start, integer stop) {
    integer part = (stop - start + 1) / 2;
    for (integer step = 0; step < part; step++) {
        integer first = start + step, second = least(start + part + step, stop - 1);
        const bf16 *ws[W] = {e->gate + first * e->gate_stride, e->gate + second * e->gate_stride,
                             e->up + first * e->up_stride, e->up + second * e->up_stride};
        for (integer j = 0; j < e->n_rows; j += X) {
            float found[W][X];
            integer n_x = least(e->n_rows - j, X);
            tile(ws, e->x + j * hidden, hidden, n_x, found);
            for (int k = 0; k < n_x; k++) {
                middle[(j + k) * inner + first] = gated(found[0][k], found[2][k]);
                middle[(j + k) * inner + second] = gated(found[1][k], found[3][k]);
            }
        }
    }
}

/* y [n_rows, out] = x [n_rows, columns] wT (+ bias [out]). */
void fiddler_matmul(const bf16 *w, integer stride, const bf16 *x, const bf16 *bias, bf16 *y, integer out,
                    integer columns, integer n_rows, int n_threads) {
    integer rows = chunk_rows(1, out, columns, n_threads);
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (integer start = 0; start < out; start += rows)
        multiply(w, stride, x, bias, y, out, columns, n_rows, start, least(start + rows, out));
}

/* A layer's experts; middle [sum of n_rows, inner] is room for what lies between up and down. */
void fiddler_experts(const expert *experts, integer n, integer hidden, integer inner, bf16 *middle, int n_threads) {
    integer up_rows = chunk_rows(n, inner, 2 * hidden, n_threads);
    integer down_rows = chunk_rows(n, hidden, inner, n_threads);
    integer up_chunks = (inner + up_rows - 1) / up_rows, down_chunks = (hidden + down_rows - 1) / down_rows;
    bf16 *rooms[n];
    for (integer i = 0; i < n; i++) {
        rooms[i] = middle;
        middle += experts[i].n_rows * inner;
    }
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for schedule(dynamic)
        for (integer chunk = 0; chunk < n * up_chunks; chunk++) {
            integer i = chunk / up_chunks, start = chunk % up_chunks * up_rows;
            rise(experts + i, rooms[i], hidden, inner, start, least(start + up_rows, inner));
        }
#pragma omp for schedule(dynamic) nowait
        for (integer chunk = 0; chunk < n * down_chunks; chunk++) {
            const expert *e = experts + chunk / down_chunks;
            integer start = chunk % down_chunks * down_rows;
            multiply(e->down, e->down_stride, rooms[chunk / down_chunks], 0, e->y, hidden, inner, e->n_rows, start,
                     least(start + down_rows, hidden));
        }
    }
}
