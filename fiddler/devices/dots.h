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
enum { AHEAD = 2048 };  /* Bytes: rows of codes are too short for the machine to see what comes next. */
enum { ROOM_A_COLUMN = 4 * (2 * PANEL + 2 * W + 3), SLACK = 256 }; /* Bytes of a thread's room, by columns of SLACK more. */

/* How a matrix is walked. */
typedef struct {
    integer block, blocks, whole; /* columns of a block, blocks of a row, those of them that are full */
    integer bytes;                /* of a block */
    integer per, shift;           /* a block has so many scales; or if one, 2 ** shift blocks share it */
    int laid;                     /* whether scales are repeated until that is true */
    int slow;                     /* whether lanes do not fit */
} walk;

static walk walk_of(const matrix *m) {
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

/* A thread's room: a panel of activations and their sums, and the scales and zeros of W rows. */
typedef struct {
    number *x;
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
    }
    d.spare = at + 2 * W * wide;
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

/* n rows of activations in the order of a matrix's numbers, with their sums lane by lane where blocks have zeros. */
static void arrange(const matrix *m, const walk *way, desk *d, const bf16 *x, integer stride, integer n) {
    int kind = (int)m->kind;
    if (kind == PLAIN || way->slow) return;
    for (integer j = 0; j < n; j++)
        for (integer b = 0; b < way->blocks; b++) {
            const bf16 *from = x + j * stride + b * way->block;
            number *to = d->x + (j * way->blocks + b) * way->block;
            bf16 padded[128] = {0};
            if (b >= way->whole) {
                memcpy(padded, from, (size_t)(m->columns - b * way->block) * sizeof *from);
                from = padded;
            }
            if (is_half(kind)) /* constants, so that each case becomes vectors */
                arrange_block(1, from, to);
            else
                arrange_block(0, from, to);
            if (!m->zeros && !shifted(kind)) continue;
            floats sum = {0};
            for (integer k = 0; k < way->block; k += PIECE) sum = products(sum, load_numbers(to + k), ones());
            memcpy(d->sums + (j * way->blocks + b) * LANES, &sum, sizeof sum);
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
    integer block = stored(m, row) / m->block_rows;
    if (way->slow) return;
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

/* One block of W rows of codes and n_x rows of activations. */
INLINE void dots_block(const int kind, const int zeros, const int one, const int n_x, const int whole, tables t, const byte *codes[W],
                       integer left, const desk *d, const walk *way, ints at, integer j, integer b, floats all[W][X]) {
    const number *x = d->x + (j * way->blocks + b) * way->block;
    const float *sums = d->sums + (j * way->blocks + b) * LANES;
    UNROLL for (int i = 0; i < W; i++) {
        values ws[8];
        const byte *from = codes[i] + b * way->bytes;
        if (whole) __builtin_prefetch(from + AHEAD);
        decode(kind, t, load_codes(from, left, whole), ws);
        integer part = one ? b >> way->shift : b * way->per;
        floats scale = spread(d->scales[i] + part, one, at);
        floats zero = {0};
        if (zeros) zero = spread(d->zeros[i] + part, one, at);
        if (shifted(kind)) zero += shift_of(kind, zeros);
        UNROLL for (int k = 0; k < n_x; k++) {
            floats sum = {0};
            if (zeros || shifted(kind)) sum -= zero * load_floats(sums + k * way->blocks * LANES);
            UNROLL for (int p = 0; p < pieces_of(kind); p++)
                sum = products(sum, ws[p], load_numbers(x + k * way->blocks * way->block + partner(p) * PIECE));
            all[i][k] += sum * scale;
        }
    }
}

INLINE void dots_codes(const int kind, const int zeros, const int one, const int n_x, tables t, const byte *codes[W], const desk *d,
                       const walk *way, integer left, integer j, float out[W][X]) {
    floats all[W][X];
    ints at = spread_of(way->per);
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < n_x; k++) all[i][k] = (floats){0};
    for (integer b = 0; b < way->whole; b++)
        dots_block(kind, zeros, one, n_x, 1, t, codes, 0, d, way, at, j, b, all);
    if (way->whole < way->blocks) dots_block(kind, zeros, one, n_x, 0, t, codes, left, d, way, at, j, way->whole, all);
    UNROLL for (int i = 0; i < W; i++) UNROLL for (int k = 0; k < n_x; k++) out[i][k] = total(all[i][k]);
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
#define TILES(name, kind, zeros) TILE(name##_one, kind, zeros, 1) TILE(name##_few, kind, zeros, 0)
TILES(tile_half, INT4, 0)
TILES(tile_half_zeros, INT4, 1)
TILES(tile_nf4, NF4, 0)
TILES(tile_int8, INT8, 0)
TILES(tile_uint8, UINT8, 0)
TILES(tile_uint8_zeros, UINT8, 1)
TILES(tile_fp8, FP8, 0)

typedef void tile_function(tables, const byte *[W], const desk *, const walk *, integer, integer, integer, float[W][X]);

static tile_function *tile_for(integer kind, int zeros, int one) {
#define EITHER(name) (one ? name##_one : name##_few)
    switch (kind) {
        case INT4:
        case FP4: return zeros ? EITHER(tile_half_zeros) : EITHER(tile_half);
        case NF4: return EITHER(tile_nf4);
        case INT8: return EITHER(tile_int8);
        case UINT8: return zeros ? EITHER(tile_uint8_zeros) : EITHER(tile_uint8);
        default: return EITHER(tile_fp8);
    }
}

/* The dot products of rows of weights of one kind, whose scales the desk has read, with activations j to j + n_x of
   its panel; without their factors. */
static void tile(const matrix *m, const walk *way, const byte *codes[W], const desk *d, const bf16 *x, integer stride,
                 integer j, integer n_x, float out[W][X]) {
    x += j * stride;
    if (m->kind != PLAIN) {
        if (way->slow)
            dots_slowly(d, x, stride, n_x, out);
        else
            tile_for(m->kind, m->zeros != 0, way->per == 1)(tables_of((int)m->kind, m->zeros != 0), codes, d, way,
                                                            row_bytes(m) - way->whole * way->bytes, j, n_x, out);
        return;
    }
    switch (n_x) {
        case 1: dots_plain(1, codes, x, stride, m->columns, out); break;
        case 2: dots_plain(2, codes, x, stride, m->columns, out); break;
        case 3: dots_plain(3, codes, x, stride, m->columns, out); break;
        default: dots_plain(X, codes, x, stride, m->columns, out);
    }
}

#endif
