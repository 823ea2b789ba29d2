/* Dot products of a few rows of weights with a few of activations, for every kind of weights.

   A thread multiplies a panel of activations, arranged as the weights' kind wants them, by rows of weights whose scales
   it has read into float32. Products are summed in float32 block by block, a block's sums are multiplied by its scales
   there, and a row's by its factor at the end. Where blocks have zeros, zero times the sum of activations is taken away.

   A result depends on its row and its weights alone, never on how many rows run beside it. */

#ifndef DOTS_H
#define DOTS_H

#include "lanes.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum { W = 4, X = 4 };  /* A tile: rows of weights by rows of activations. */
enum { PANEL = 16 };    /* Activations that are arranged at a time. */
enum { AHEAD = 512 };    /* Bytes: rows of codes are too short for the machine to see what comes next. */
enum { ROOM_A_COLUMN = 4 * (2 * PANEL + 3 * W + 3), SLACK = 256 }; /* Bytes of a thread's room, by columns of SLACK more. */

/* How a matrix is walked. */
typedef struct {
    integer block, blocks, whole; /* columns of a block, blocks of a row, those of them that are full */
    integer bytes;                /* of a block */
    integer per, shift;           /* a block has so many scales; or if one, 2 ** shift blocks share it */
    int laid;                     /* whether scales are repeated until that is true */
    int slow;                     /* whether lanes do not fit */
} walk;

/* The way through blocks of ggml.h, whose scales stay in the order in which columns have them. */
static walk walk_of_blocks(const matrix *m) {
    int kind = (int)m->kind, block = block_of(kind), group = (int)group_of(kind), nibbles = in_nibbles(kind);
    integer bytes = block_bytes_of(kind) * block / block_columns_of(kind);
    walk way = {block, parts(m->columns, block), m->columns / block, bytes, 1, 0, 0, 0};
    if (!NARROW) way.per = block / group;
    while (NARROW && LANES << way.shift < (nibbles && kind < Q4_K ? group / 2 : group)) way.shift++;
    return way;
}

static walk walk_of(const matrix *m) {
    if (in_blocks(m->kind)) return walk_of_blocks(m);
    integer block = block_of((int)m->kind), columns = m->columns, per = 1;
    walk way = {block, parts(columns, block), columns / block, is_half(m->kind) ? block / 2 : block, 1, 0, 0, 0};
    if (m->block_columns >= columns) {
        way.shift = 62;
        return way;
    }
    while (m->block_columns % (block / per)) {
        per = NARROW && per == 1 ? LANES : 2 * per;
        if (per > LANES || block / per < grain_of((int)m->kind)) {
            way.slow = 1;
            return way;
        }
    }
    way.per = per;
    integer shares = m->block_columns / (block / per); /* parts of blocks */
    while (per == 1 && way.shift < 32 && (integer)1 << way.shift < shares) way.shift++;
    way.laid = per == 1 ? (integer)1 << way.shift != shares : shares > 1;
    if (way.laid) way.shift = 0;
    return way;
}

/* A thread's room: a panel of activations and their sums, and the scales, zeros and numbers of W rows. */
typedef struct {
    number *x, *w[W];
    float *sums, *scales[W], *zeros[W], *spare;
    integer blocks[W];      /* the rows of blocks whose scales these are */
    const matrix *of[W];    /* the matrices and their rows, where blocks fit no lanes */
    integer rows[W];
} desk;

static desk desk_of(byte *room, integer columns) {
    integer wide = parts(columns, SLACK) * SLACK + SLACK;
    desk d;
    d.sums = (float *)room;
    d.x = (number *)(d.sums + PANEL * wide);
    float *at = (float *)((byte *)d.x + PANEL * wide * 4);
    for (int i = 0; i < W; i++) {
        d.scales[i] = at + 2 * i * wide;
        d.zeros[i] = at + (2 * i + 1) * wide;
        d.w[i] = (number *)(at + (2 * W + i) * wide);
    }
    d.spare = at + 3 * W * wide;
    return d;
}

/* Bytes of a thread's room, for matrices of so many columns at most. */
INLINE integer room_of(integer columns) { return (parts(columns, SLACK) + 1) * SLACK * ROOM_A_COLUMN; }

INLINE int thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static void forget(desk *d) {
    for (int i = 0; i < W; i++) d->blocks[i] = -1;
}

/* A row of activations in the order of a matrix's numbers, with its sums lane by lane where something is taken away. */
INLINE void arrange_row(const int kind, const matrix *m, const walk *way, const bf16 *x, number *to, float *sums) {
    const int sets = sets_of(kind), pieces = way->block / PIECE;
    for (integer b = 0; b < way->blocks; b++, to += way->block, sums += sets * LANES) {
        const bf16 *from = x + first_column(kind, b);
        bf16 padded[128] = {0};
        if (b >= way->whole) {
            memcpy(padded, from, (size_t)(m->columns - b * way->block) * sizeof *from);
            from = padded;
        }
        arrange_block(kind, from, to);
        if (!m->zeros && !shifted(kind) && !has_minima(kind)) continue;
        for (int set = 0; set < sets; set++) {
            floats sum = {0};
            for (int p = set; p < pieces; p += sets) sum = products(sum, load_numbers(to + p * PIECE), ones());
            memcpy(sums + set * LANES, &sum, sizeof sum);
        }
    }
}

/* n rows of activations. */
static void arrange(const matrix *m, const walk *way, desk *d, const bf16 *x, integer stride, integer n) {
    if (m->kind == PLAIN || way->slow) return;
    for (integer j = 0; j < n; j++, x += stride) {
        number *to = d->x + j * way->blocks * way->block;
        float *sums = d->sums + j * way->blocks * sets_of((int)m->kind) * LANES;
        switch (m->kind) { /* constants, so that each case becomes vectors */
            case INT4:
            case FP4:
            case NF4: arrange_row(INT4, m, way, x, to, sums); break;
            case INT8: arrange_row(INT8, m, way, x, to, sums); break;
            case UINT8: arrange_row(UINT8, m, way, x, to, sums); break;
            case FP8: arrange_row(FP8, m, way, x, to, sums); break;
            case Q8_0: arrange_row(Q8_0, m, way, x, to, sums); break;
            case Q4_0:
            case MXFP4: arrange_row(Q4_0, m, way, x, to, sums); break;
            case Q6_K: arrange_row(Q6_K, m, way, x, to, sums); break;
            default: arrange_row(Q4_K, m, way, x, to, sums);
        }
    }
}

/* One number for each part of a block that shares a scale, of one for each block of columns. */
static void lay(const matrix *m, const walk *way, const float *from, float *to) {
    integer n = way->blocks * way->per, part = way->block / way->per, at = 0, across = scales_across(m);
    integer repeats = m->block_columns / part;
    for (integer i = 0; i < across; i++)
        for (integer k = 0; k < repeats && at < n; k++) to[at++] = from[i];
    while (at < n) to[at++] = 0; /* behind the last column, where everything is multiplied by zero */
}

/* Read the scales of a row of weights into place i of the desk, unless they are there. */
static void read(const matrix *m, const walk *way, desk *d, int i, integer row) {
    if (m->kind == PLAIN) return;
    d->of[i] = m;
    d->rows[i] = row;
    if (way->slow) return;
    if (in_blocks(m->kind)) {
        read_groups(m->kind, codes_of(m, row), m->columns, d->scales[i], d->zeros[i]);
        return;
    }
    integer block = stored(m, row) / m->block_rows;
    if (block == d->blocks[i]) return;
    d->blocks[i] = block;
    __builtin_prefetch(m->scales + block * m->scales_stride + AHEAD / 8);
    if (!way->laid) {
        read_scales(m, block, d->scales[i]);
        if (m->zeros) read_zeros(m, block, d->zeros[i]);
        return;
    }
    read_scales(m, block, d->spare);
    lay(m, way, d->spare, d->scales[i]);
    if (m->zeros) {
        read_zeros(m, block, d->spare);
        lay(m, way, d->spare, d->zeros[i]);
    }
}

/* Where the scales of a set of a block begin. */
INLINE integer part_of(const int kind, const int one, const walk *way, integer b, int set) {
    if (!one) return b * way->per;
    integer at = b >> way->shift;
    return kind == Q6_K ? at / 4 * 8 + at % 4 + 4 * set : kind >= Q4_K ? 2 * at + set : at;
}

/* One block of numbers of a row of weights, times n_x rows of activations, each added to its sums. */
INLINE void dots_block(const int kind, const int zeros, const int one, const int n_x, const values *ws, const desk *d,
                       const walk *way, int i, const ints *at, integer j, integer b, floats all[X]) {
    const int sets = sets_of(kind);
    const integer block = way->blocks * way->block, step = way->blocks * sets * LANES;
    const number *x = d->x + j * block + b * way->block;
    const float *sums = d->sums + j * step + b * sets * LANES;
    UNROLL for (int set = 0; set < sets; set++, sums += LANES) {
        integer part = part_of(kind, one, way, b, set);
        floats scale = spread(d->scales[i] + part, one, at[set]), zero = {0};
        if (zeros || has_minima(kind)) zero = spread(d->zeros[i] + part, one, at[set]);
        if (shifted(kind)) zero += shift_of(kind, zeros);
        UNROLL for (int k = 0; k < n_x; k++) {
            floats sum = {0};
            if (zeros || shifted(kind)) sum -= zero * load_floats(sums + k * step);
            UNROLL for (int p = set; p < pieces_of(kind); p += sets)
                sum = products(sum, ws[p], load_numbers(x + k * block + partner(p) * PIECE));
            all[k] += sum * scale;
            if (has_minima(kind)) all[k] -= zero * load_floats(sums + k * step);
        }
    }
}

INLINE void dots_taken(const int kind, const int zeros, const int one, const int n_x, const int whole, tables t,
                       const byte *codes[W], integer left, const desk *d, const walk *way, const ints *at, integer j,
                       integer b, floats all[W][X]) {
    UNROLL for (int i = 0; i < W; i++) {
        values ws[8];
        if (whole) __builtin_prefetch(codes[i] + b * way->bytes + AHEAD);
        take(kind, t, codes[i], b, left, whole, ws);
        dots_block(kind, zeros, one, n_x, ws, d, way, i, at, j, b, all[i]);
    }
}

INLINE void dots_codes(const int kind, const int zeros, const int one, const int n_x, tables t, const byte *codes[W],
                       const desk *d, const walk *way, integer left, integer j, float out[W][X]) {
    floats all[W][X];
    const ints at[2] = {spread_of(kind, way->per, 0), spread_of(kind, way->per, 1)};
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < n_x; k++) all[i][k] = (floats){0};
    for (integer b = 0; b < way->whole; b++)
        dots_taken(kind, zeros, one, n_x, 1, t, codes, 0, d, way, at, j, b, all);
    if (way->whole < way->blocks)
        dots_taken(kind, zeros, one, n_x, 0, t, codes, left, d, way, at, j, way->whole, all);
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < n_x; k++) out[i][k] = total(all[i][k]);
}

/* The same of numbers that are taken already, in the same order. Two rows of activations at a time, since those of a
   panel come from the second cache, and the four of weights stay in the first. */
INLINE void dots_ready(const int kind, const int zeros, const int one, const desk *d, const walk *way, integer j,
                       float out[W][X]) {
    const int sets = sets_of(kind), pieces = pieces_of(kind);
    const ints at[2] = {spread_of(kind, way->per, 0), spread_of(kind, way->per, 1)};
    const integer block = way->blocks * way->block, step = way->blocks * sets * LANES;
    for (int first = 0; first < X; first += 2) {
        const number *x = d->x + (j + first) * block;
        const float *sums = d->sums + (j + first) * step;
        floats all[W][2];
        UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < 2; k++) all[i][k] = (floats){0};
        for (integer b = 0; b < way->blocks; b++, x += way->block)
            UNROLL for (int set = 0; set < sets; set++, sums += LANES) {
                integer part = part_of(kind, one, way, b, set);
                floats sum[W][2], zero[W];
                UNROLL for (int i = 0; i < W; i++) {
                    zero[i] = (floats){0};
                    if (zeros || has_minima(kind)) zero[i] = spread(d->zeros[i] + part, one, at[set]);
                    if (shifted(kind)) zero[i] += shift_of(kind, zeros);
                    UNROLL for (int k = 0; k < 2; k++) {
                        sum[i][k] = (floats){0};
                        if (zeros || shifted(kind)) sum[i][k] -= zero[i] * load_floats(sums + k * step);
                    }
                }
                UNROLL for (int p = set; p < pieces; p += sets) {
                    values xs[2] = {load_numbers(x + partner(p) * PIECE), load_numbers(x + block + partner(p) * PIECE)};
                    ONCE(xs[0]);
                    ONCE(xs[1]);
                    UNROLL for (int i = 0; i < W; i++) {
                        values ws = load_numbers(d->w[i] + (b * pieces + p) * PIECE);
                        UNROLL for (int k = 0; k < 2; k++) sum[i][k] = products(sum[i][k], ws, xs[k]);
                    }
                }
                UNROLL for (int i = 0; i < W; i++) {
                    floats scale = spread(d->scales[i] + part, one, at[set]);
                    UNROLL for (int k = 0; k < 2; k++) {
                        all[i][k] += sum[i][k] * scale;
                        if (has_minima(kind)) all[i][k] -= zero[i] * load_floats(sums + k * step);
                    }
                }
            }
        UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < 2; k++) out[i][first + k] = total(all[i][k]);
    }
}

/* Take the numbers of W rows of weights. */
INLINE void take_rows(const int kind, tables t, const byte *codes[W], const desk *d, const walk *way, integer left) {
    for (int i = 0; i < W; i++) {
        number *to = d->w[i];
        for (integer b = 0; b < way->blocks; b++) {
            values ws[8];
            if (b < way->whole) {
                __builtin_prefetch(codes[i] + b * way->bytes + AHEAD);
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
#define TILE(name, kind, zeros, one)                                                                                \
    static void name(tables t, const byte *codes[W], const desk *d, const walk *way, integer left, integer j,       \
                     integer n_x, float out[W][X]) {                                                                \
        switch (n_x) { /* constants, so that sums stay in registers; a fourth row beside three is not looked at */  \
            case 1: dots_codes(kind, zeros, one, 1, t, codes, d, way, left, j, out); break;                         \
            case 2: dots_codes(kind, zeros, one, 2, t, codes, d, way, left, j, out); break;                         \
            default: dots_codes(kind, zeros, one, X, t, codes, d, way, left, j, out);                               \
        }                                                                                                           \
    }
#define READY(name, kind, zeros, one)                                                                               \
    static void ready_##name(const desk *d, const walk *way, integer j, float out[W][X]) {                          \
        dots_ready(kind, zeros, one, d, way, j, out);                                                               \
    }
#define TAKE(name, kind)                                                                                            \
    static void take_##name(tables t, const byte *codes[W], const desk *d, const walk *way, integer left) {         \
        take_rows(kind, t, codes, d, way, left);                                                                    \
    }
#define BOTH(name, kind, zeros)                                                                                     \
    TILE(tile_##name##_one, kind, zeros, 1) TILE(tile_##name##_few, kind, zeros, 0)                                 \
    READY(name##_one, kind, zeros, 1) READY(name##_few, kind, zeros, 0)
BOTH(half, INT4, 0)
BOTH(half_zeros, INT4, 1)
BOTH(nf4, NF4, 0)
BOTH(int8, INT8, 0)
BOTH(uint8, UINT8, 0)
BOTH(uint8_zeros, UINT8, 1)
BOTH(fp8, FP8, 0)
TILE(tile_q4_0, Q4_0, 0, NARROW)
TILE(tile_q8_0, Q8_0, 0, NARROW)
TILE(tile_mxfp4, MXFP4, 0, NARROW)
TILE(tile_q4_k, Q4_K, 0, NARROW)
TILE(tile_q5_k, Q5_K, 0, NARROW)
TILE(tile_q6_k, Q6_K, 0, NARROW)
READY(minima, Q4_K, 0, NARROW)
READY(q6_k, Q6_K, 0, NARROW)
TAKE(half, INT4)
TAKE(nf4, NF4)
TAKE(int8, INT8)
TAKE(uint8, UINT8)
TAKE(fp8, FP8)
TAKE(q4_0, Q4_0)
TAKE(q8_0, Q8_0)
TAKE(mxfp4, MXFP4)
TAKE(q4_k, Q4_K)
TAKE(q5_k, Q5_K)
TAKE(q6_k, Q6_K)

typedef void tile_function(tables, const byte *[W], const desk *, const walk *, integer, integer, integer, float[W][X]);
typedef void ready_function(const desk *, const walk *, integer, float[W][X]);
typedef void take_function(tables, const byte *[W], const desk *, const walk *, integer);
typedef struct {
    tile_function *tile;   /* a few rows of activations */
    take_function *take;   /* or more: numbers are taken first */
    ready_function *ready;
} kernels;

#define EITHER(name, take)                                                                                          \
    (one ? (kernels){tile_##name##_one, take_##take, ready_##name##_one}                                            \
         : (kernels){tile_##name##_few, take_##take, ready_##name##_few})
#define ALIKE(name, ready)                                                                                          \
    (kernels) { tile_##name, take_##name, NARROW ? ready_##ready##_one : ready_##ready##_few }
static kernels kernels_for(integer kind, int zeros, int one) {
    switch (kind) {
        case INT4:
        case FP4: return zeros ? EITHER(half_zeros, half) : EITHER(half, half);
        case NF4: return EITHER(nf4, nf4);
        case INT8: return EITHER(int8, int8);
        case UINT8: return zeros ? EITHER(uint8_zeros, uint8) : EITHER(uint8, uint8);
        case FP8: return EITHER(fp8, fp8);
        case Q4_0: return ALIKE(q4_0, half);
        case Q8_0: return ALIKE(q8_0, int8);
        case MXFP4: return ALIKE(mxfp4, half);
        case Q4_K: return (kernels){tile_q4_k, take_q4_k, ready_minima};
        case Q5_K: return (kernels){tile_q5_k, take_q5_k, ready_minima};
        default: return (kernels){tile_q6_k, take_q6_k, ready_q6_k};
    }
}

/* What multiplies rows of a matrix with a panel of n activations, and has their numbers taken first if that pays. */
typedef struct {
    const matrix *m;
    walk way;
    kernels own;
    tables t;
    integer left; /* bytes of a row behind its whole blocks */
    int taken;
} multiplier;

static multiplier multiplier_of(const matrix *m, integer n) {
    multiplier found = {.m = m, .way = walk_of(m)};
    if (m->kind == PLAIN || found.way.slow) return found;
    found.own = kernels_for(m->kind, m->zeros != 0, found.way.per == 1);
    found.t = tables_of((int)m->kind, m->zeros != 0);
    found.left = row_bytes(m) - found.way.whole * found.way.bytes;
    found.taken = n > X;
    return found;
}

static void take_numbers(const multiplier *k, const byte *codes[W], const desk *d) {
    if (k->taken) k->own.take(k->t, codes, d, &k->way, k->left);
}

/* The dot products of rows of weights of one kind, whose scales the desk has read, with activations j to j + n_x of
   its panel; without their factors. */
static void tile(const multiplier *k, const byte *codes[W], const desk *d, const bf16 *x, integer j, integer n_x,
                 float out[W][X]) {
    const matrix *m = k->m;
    integer columns = m->columns;
    x += j * columns;
    if (k->taken) {
        k->own.ready(d, &k->way, j, out);
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
