/* Dot products of a few rows of weights with a few of activations, for every kind of weights.

   A thread multiplies a panel of activations, arranged as the weights' kind wants them, by rows of weights whose scales
   it has read into float32. Products are summed in float32 up to the next scale and multiplied by it, and a row's sum by
   its factor at the end. A group's zero or minimum is an offset, which multiplies the sum of the group's activations
   once.

   A result depends on its row and its weights alone, never on how many rows run beside it. */

#ifndef DOTS_H
#define DOTS_H

#include "desk.h"

enum { AHEAD = 512 };   /* Bytes: rows of codes are too short for the machine to see what comes next. */

/* Where the scales of a set of a block begin. */
INLINE integer part_of(const int kind, const int one, const walk *way, integer b, int set) {
    if (!one) return b * way->per;
    integer at = b >> way->shift;
    return kind == Q6_K ? at / 4 * 8 + at % 4 + 4 * set : kind >= Q4_K ? 2 * at + set : at;
}

/* The block behind the last that shares scales with block b. */
INLINE integer span_end(const int one, const walk *way, integer b) {
    return one ? least(((b >> way->shift) + 1) << way->shift, way->blocks) : b + 1;
}

/* Subtract a row's offsets from its sums. */
INLINE floats less_offsets(const desk *d, int i, integer j, floats all) {
    const float *sums = d->sums + j * d->padded, *offsets = d->offsets[i];
    for (integer g = 0; g < d->padded; g += LANES) all -= load_floats(offsets + g) * load_floats(sums + g);
    return all;
}

/* Prefetch codes; those of ggml's blocks a row ahead, for all scales of a row are read before its first code. */
INLINE void ask_ahead(const int kind, const walk *way, const byte *codes, integer b) {
    const byte *from = codes + b * way->bytes + (in_blocks(kind) ? way->blocks * way->bytes : AHEAD);
    __builtin_prefetch(from);
    if (in_blocks(kind)) __builtin_prefetch(from + 64); /* a block is more than a line */
}

/* One block of W rows of codes times n_x rows of activations, `x` and a `step` on. */
INLINE void dots_block(const int kind, const int n_x, const int whole, tables t, const byte *codes[W], integer left,
                       const walk *way, const number *x, integer step, integer b, floats sum[2][W][2]) {
    UNROLL for (int i = 0; i < W; i++) {
        values ws[8];
        if (whole) ask_ahead(kind, way, codes[i], b);
        take(kind, t, codes[i], b, left, whole, ws);
        UNROLL for (int k = 0; k < n_x; k++) UNROLL for (int p = 0; p < pieces_of(kind); p++) {
                floats *to = &sum[p % sets_of(kind)][i][k];
                *to = products(*to, ws[p], load_numbers(x + b * way->block + k * step + partner(p) * PIECE));
            }
    }
}

INLINE void dots_codes(const int kind, const int one, const int n_x, tables t, const byte *codes[W], const desk *d,
                       const walk *way, integer left, integer j, int first_x, float out[W][X]) {
    const int sets = sets_of(kind);
    const ints lanes[2] = {spread_of(kind, way->per, 0), spread_of(kind, way->per, 1)};
    const integer step = way->blocks * way->block;
    const number *x = d->x + (j + first_x) * step;
    floats all[W][2];
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < n_x; k++) all[i][k] = (floats){0};
    for (integer b = 0, first = 0; b < way->blocks; first = b) {
        floats sum[2][W][2];
        integer stop = span_end(one, way, b);
        UNROLL for (int i = 0; i < 2 * W * 2; i++) sum[i / (2 * W)][i / 2 % W][i % 2] = (floats){0};
        for (integer until = least(stop, way->whole); b < until; b++)
            dots_block(kind, n_x, 1, t, codes, 0, way, x, step, b, sum);
        if (b < stop) dots_block(kind, n_x, 0, t, codes, left, way, x, step, b++, sum);
        UNROLL for (int set = 0; set < sets; set++) UNROLL for (int i = 0; i < W; i++) {
                floats scale = spread(d->scales[i] + part_of(kind, one, way, first, set), one, lanes[set]);
                UNROLL for (int k = 0; k < n_x; k++) all[i][k] += sum[set][i][k] * scale;
            }
    }
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < n_x; k++)
        out[i][first_x + k] = total(less_offsets(d, i, j + first_x + k, all[i][k]));
}

/* The same of rows that are decoded already, in the same order. Two rows of activations at a time, since those of a
   panel come from the second cache, and the four of weights stay in the first. */
INLINE void dots_decoded(const int kind, const int one, const desk *d, const walk *way, integer j, integer n_x,
                       float out[W][X]) {
    const int sets = sets_of(kind), pieces = pieces_of(kind);
    const ints lanes[2] = {spread_of(kind, way->per, 0), spread_of(kind, way->per, 1)};
    const integer step = way->blocks * way->block;
    for (integer two = 0; two < n_x; two += 2) {
        floats all[W][2];
        UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < 2; k++) all[i][k] = (floats){0};
        for (integer first = 0, stop; first < way->blocks; first = stop) {
            stop = span_end(one, way, first);
            UNROLL for (int set = 0; set < sets; set++) {
                floats sum[W][2];
                UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < 2; k++) sum[i][k] = (floats){0};
                for (integer b = first; b < stop; b++) {
                    if ((b & 7) == ((j + two) / 2 & 7)) /* else memory would be idle while decoded rows are used */
                        UNROLL for (int i = 0; i < W; i++) __builtin_prefetch(d->next[i] + b * way->bytes);
                    UNROLL for (int p = set; p < pieces; p += sets) {
                        const number *x = d->x + (j + two) * step + b * way->block + partner(p) * PIECE;
                        values xs[2] = {load_numbers(x), load_numbers(x + step)};
                        ONCE(xs[0]);
                        ONCE(xs[1]);
                        UNROLL for (int i = 0; i < W; i++) {
                            values ws = load_numbers(d->w[i] + (b * pieces + p) * PIECE);
                            UNROLL for (int k = 0; k < 2; k++) sum[i][k] = products(sum[i][k], ws, xs[k]);
                        }
                    }
                }
                UNROLL for (int i = 0; i < W; i++) {
                    floats scale = spread(d->scales[i] + part_of(kind, one, way, first, set), one, lanes[set]);
                    UNROLL for (int k = 0; k < 2; k++) all[i][k] += sum[i][k] * scale;
                }
            }
        }
        UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < 2; k++)
            out[i][two + k] = total(less_offsets(d, i, j + two + k, all[i][k]));
    }
}

/* Decode W rows of weights. */
INLINE void decode_rows(const int kind, tables t, const byte *codes[W], const desk *d, const walk *way, integer left) {
    for (int i = 0; i < W; i++) {
        number *to = d->w[i];
        for (integer b = 0; b < way->blocks; b++) {
            values ws[8];
            if (b < way->whole) {
                ask_ahead(kind, way, codes[i], b);
                take(kind, t, codes[i], b, 0, 1, ws);
            } else {
                take(kind, t, codes[i], b, left, 0, ws);
            }
            UNROLL for (int p = 0; p < pieces_of(kind); p++, to += PIECE) store_numbers(to, ws[p]);
        }
    }
}

/* LANES or more bfloat16 of a row as the machine multiplies them, or as many as are left, zeros behind them. */
#if defined(__AVX512BF16__) && !defined(PORTABLE)
enum { PAIRS = 32 };
typedef __m512bh pairs;
INLINE pairs load_pairs(const bf16 *from) { return (pairs)_mm512_loadu_si512(from); }
INLINE pairs load_some(const bf16 *from, integer n) {
    return (pairs)_mm512_maskz_loadu_epi16(((__mmask32)1 << n) - 1, from);
}
INLINE floats add(floats so_far, pairs a, pairs b) { return (floats)_mm512_dpbf16_ps((__m512)so_far, a, b); }
#else
enum { PAIRS = LANES };
typedef floats pairs;
INLINE pairs load_pairs(const bf16 *from) { return load_bf16(from); }
INLINE pairs load_some(const bf16 *from, integer n) {
    bf16 padded[PAIRS] = {0};
    memcpy(padded, from, (size_t)n * sizeof *padded);
    return load_bf16(padded);
}
INLINE floats add(floats so_far, pairs a, pairs b) { return so_far + a * b; }
#endif

INLINE void dots_plain(const int n_x, const byte *codes[W], const bf16 *x, integer stride, integer columns,
                       float out[W][X]) {
    floats all[W][X];
    pairs xs[X];
    const bf16 *w[W];
    integer at = 0;
    UNROLL for (int i = 0; i < W; i++) w[i] = (const bf16 *)codes[i];
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int j = 0; j < n_x; j++) all[i][j] = (floats){0};
    for (; at + PAIRS <= columns; at += PAIRS) {
        UNROLL for (int j = 0; j < n_x; j++) xs[j] = load_pairs(x + j * stride + at);
        UNROLL for (int i = 0; i < W; i++) {
            pairs ws = load_pairs(w[i] + at);
            UNROLL for (int j = 0; j < n_x; j++) all[i][j] = add(all[i][j], ws, xs[j]);
        }
    }
    if (at < columns) {
        UNROLL for (int j = 0; j < n_x; j++) xs[j] = load_some(x + j * stride + at, columns - at);
        UNROLL for (int i = 0; i < W; i++) {
            pairs ws = load_some(w[i] + at, columns - at);
            UNROLL for (int j = 0; j < n_x; j++) all[i][j] = add(all[i][j], ws, xs[j]);
        }
    }
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int j = 0; j < n_x; j++) out[i][j] = total(all[i][j]);
}

/* Any block of columns: each row once more as float32, one product after the other. */
static void dots_slowly(const desk *d, const bf16 *x, integer stride, integer n_x, float out[W][X]) {
    for (int i = 0; i < W; i++) {
        integer columns = d->of[i]->columns;
        read_row(d->of[i], d->rows[i], 1.0f, d->scales[0], d->spare);
        for (integer j = 0; j < n_x; j++) {
            float sum = 0;
            for (integer c = 0; c < columns; c++) sum += d->spare[c] * widen(x[j * stride + c]);
            out[i][j] = sum;
        }
    }
}

/* Kinds that differ in their tables alone are one: INT4 stands for all of 4 bits that one table has. */
#define TILE(name, kind, one)                                                                                       \
    static void tile_##name(tables t, const byte *codes[W], const desk *d, const walk *way, integer left, integer j, \
                            integer n_x, float out[W][X]) {                                                         \
        if (n_x == 1) /* constants, so that sums stay in registers */                                               \
            dots_codes(kind, one, 1, t, codes, d, way, left, j, 0, out);                                            \
        else                                                                                                        \
            for (int k = 0; k < n_x; k += 2) dots_codes(kind, one, 2, t, codes, d, way, left, j, k, out);           \
    }
#define TAKE(name, kind)                                                                                            \
    static void take_##name(tables t, const byte *codes[W], const desk *d, const walk *way, integer left) {         \
        decode_rows(kind, t, codes, d, way, left);                                                                    \
    }
#define READY(name, kind, one)                                                                                      \
    static void ready_##name(const desk *d, const walk *way, integer j, integer n_x, float out[W][X]) {             \
        dots_decoded(kind, one, d, way, j, n_x, out);                                                                 \
    }
#define SCALED(name, kind) TILE(name##_one, kind, 1) TILE(name##_few, kind, 0) TAKE(name, kind)
#define BLOCKED(name, kind) TILE(name, kind, NARROW) TAKE(name, kind)
SCALED(half, INT4)
SCALED(nf4, NF4)
SCALED(int8, INT8)
SCALED(uint8, UINT8)
SCALED(fp8, FP8)
BLOCKED(q4_0, Q4_0)
BLOCKED(q8_0, Q8_0)
BLOCKED(mxfp4, MXFP4)
BLOCKED(q4_k, Q4_K)
BLOCKED(q5_k, Q5_K)
BLOCKED(q6_k, Q6_K)
READY(half_one, INT4, 1)
READY(half_few, INT4, 0)
READY(nf4_one, NF4, 1)
READY(nf4_few, NF4, 0)
READY(byte_one, INT8, 1)
READY(byte_few, INT8, 0)
READY(q4_k, Q4_K, NARROW)
READY(q6_k, Q6_K, NARROW)

typedef struct {
    void (*tile)(tables, const byte *[W], const desk *, const walk *, integer, integer, integer, float[W][X]);
    void (*take)(tables, const byte *[W], const desk *, const walk *, integer);
    void (*ready)(const desk *, const walk *, integer, integer, float[W][X]);
} kernels;

#define EITHER(name, ready)                                                                                         \
    (one ? (kernels){tile_##name##_one, take_##name, ready_##ready##_one}                                           \
         : (kernels){tile_##name##_few, take_##name, ready_##ready##_few})
static kernels kernels_for(integer kind, int one) {
    switch (kind) {
        case INT4:
        case FP4: return EITHER(half, half);
        case NF4: return EITHER(nf4, nf4);
        case INT8: return EITHER(int8, byte);
        case UINT8: return EITHER(uint8, byte);
        case FP8: return EITHER(fp8, byte);
        case Q4_0: return (kernels){tile_q4_0, take_q4_0, one ? ready_half_one : ready_half_few};
        case Q8_0: return (kernels){tile_q8_0, take_q8_0, one ? ready_byte_one : ready_byte_few};
        case MXFP4: return (kernels){tile_mxfp4, take_mxfp4, one ? ready_half_one : ready_half_few};
        case Q4_K: return (kernels){tile_q4_k, take_q4_k, ready_q4_k};
        case Q5_K: return (kernels){tile_q5_k, take_q5_k, ready_q4_k};
        default: return (kernels){tile_q6_k, take_q6_k, ready_q6_k};
    }
}

/* The kernels for one matrix and one panel of activations. */
typedef struct {
    const matrix *m;
    walk way;
    kernels own;
    tables t;
    integer left; /* bytes of a row behind its whole blocks */
    int decoded;  /* whether weights are decoded once for the whole panel, which pays for more than a tile */
} multiplier;

static multiplier multiplier_of(const matrix *m, integer n) {
    multiplier found = {.m = m, .way = walk_of(m)};
    if (m->kind == PLAIN || found.way.slow) return found;
    found.own = kernels_for(m->kind, found.way.per == 1);
    found.t = tables_of((int)m->kind, m->zeros != 0);
    found.left = row_bytes(m) - found.way.whole * found.way.bytes;
    found.decoded = n > X;
    return found;
}

static void decode_ahead(const multiplier *k, const byte *codes[W], const desk *d) {
    if (k->decoded) k->own.take(k->t, codes, d, &k->way, k->left);
}

/* The dot products of rows of weights of one kind, whose scales the desk has read, with activations j to j + n_x of
   its panel; without their factors. */
static void tile(const multiplier *k, const byte *codes[W], const desk *d, const bf16 *x, integer j, integer n_x,
                 float out[W][X]) {
    const matrix *m = k->m;
    integer columns = m->columns;
    x += j * columns;
    if (k->decoded) {
        k->own.ready(d, &k->way, j, n_x, out);
    } else if (k->own.tile) {
        k->own.tile(k->t, codes, d, &k->way, k->left, j, n_x, out);
    } else if (m->kind != PLAIN) {
        dots_slowly(d, x, columns, n_x, out);
    } else switch (n_x) {
            case 1: dots_plain(1, codes, x, columns, columns, out); break;
            case 2: dots_plain(2, codes, x, columns, columns, out); break;
            case 3: dots_plain(3, codes, x, columns, columns, out); break;
            default: dots_plain(X, codes, x, columns, columns, out);
        }
}

#endif
