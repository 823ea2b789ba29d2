/* Dot products of a few rows of weights with a few of activations, for every kind of weights.

   A thread multiplies a panel of activations, arranged as the weights' kind wants them, by rows of weights whose scales
   it has read into float32. Products are summed in float32 up to the next scale and multiplied by it, and a row's sum by
   its factor at the end. What is taken from the codes of a group (a zero, a minimum) is an offset, which multiplies the
   sum of the group's activations once.

   A result depends on its row and its weights alone, never on how many rows run beside it. */

#ifndef DOTS_H
#define DOTS_H

#include "lanes.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum { W = 4, X = 4 };  /* A tile: rows of weights by rows of activations. */
enum { PANEL = 16 };    /* Activations that are arranged at a time. */
enum { AHEAD = 512 };   /* Bytes: rows of codes are too short for the machine to see what comes next. */
enum { ROOM_A_COLUMN = 4 * (2 * PANEL + 3 * W + 3), SLACK = 256 }; /* Bytes of a thread's room, by columns of SLACK more. */

/* How a matrix is walked: block by block, and group by group of columns that share a scale. */
typedef struct {
    integer block, blocks, whole; /* columns of a block, blocks of a row, those of them that are full */
    integer bytes;                /* of a block */
    integer per, shift;           /* a block has so many groups; or if one, a group has 2 ** shift blocks */
    integer width, groups;        /* columns of a group, and groups of a row */
    int laid;                     /* whether scales are repeated until that is true */
    int slow;                     /* whether lanes do not fit */
} walk;

INLINE walk with_groups(walk way, integer columns) {
    way.width = way.per > 1 ? way.block / way.per : way.shift < 32 ? way.block << way.shift : columns;
    way.groups = parts(columns, way.width);
    return way;
}

/* The way through blocks of ggml.h, whose scales stay in the order in which columns have them. */
static walk walk_of_blocks(const matrix *m) {
    int kind = (int)m->kind, block = block_of(kind), group = (int)group_of(kind), nibbles = in_nibbles(kind);
    walk way = {.block = block, .blocks = parts(m->columns, block), .whole = m->columns / block, .per = 1};
    way.bytes = block_bytes_of(kind) * block / block_columns_of(kind);
    if (!NARROW) way.per = block / group;
    while (NARROW && LANES << way.shift < (nibbles && kind < Q4_K ? group / 2 : group)) way.shift++;
    way.width = group;
    way.groups = m->columns / group;
    return way;
}

static walk walk_of(const matrix *m) {
    if (in_blocks(m->kind)) return walk_of_blocks(m);
    integer block = block_of((int)m->kind), columns = m->columns, per = 1;
    walk way = {.block = block, .blocks = parts(columns, block), .whole = columns / block, .per = 1};
    way.bytes = is_half(m->kind) ? block / 2 : block;
    if (m->block_columns >= columns) {
        way.shift = 62;
        return with_groups(way, columns);
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
    return with_groups(way, columns);
}

/* Whether something is taken from the codes of a matrix besides what its table takes. */
INLINE int has_offsets(const matrix *m) { return m->zeros || shifted((int)m->kind) || has_minima(m->kind); }

/* A thread's room: a panel of activations and the sums of their groups; scales, offsets and numbers of W rows. */
typedef struct {
    number *x, *w[W];
    float *sums, *scales[W], *offsets[W], *spare;
    integer padded;         /* groups of a row, and zeros up to whole vectors; or none where there are no offsets */
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
        d.offsets[i] = at + (2 * i + 1) * wide;
        d.w[i] = (number *)(at + (2 * W + i) * wide);
    }
    d.spare = at + 3 * W * wide;
    d.padded = 0;
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

/* The sums of a row of activations, group by group. */
static void sum_groups(const matrix *m, const walk *way, const bf16 *x, integer padded, float *to) {
    for (integer g = 0; g < padded; g++) {
        integer at = g * way->width, stop = least(at + way->width, m->columns);
        floats sums = {0};
        for (; at + LANES <= stop; at += LANES) sums += load_bf16(x + at);
        float sum = way->width < LANES ? 0 : total(sums);
        for (; at < stop; at++) sum += widen(x[at]);
        to[g] = sum;
    }
}

/* A row of activations in the order of a matrix's numbers. */
INLINE void arrange_row(const int kind, const matrix *m, const walk *way, const bf16 *x, number *to) {
    for (integer b = 0; b < way->blocks; b++, to += way->block) {
        const bf16 *from = x + first_column(kind, b);
        bf16 padded[128] = {0};
        if (b >= way->whole) {
            memcpy(padded, from, (size_t)(m->columns - b * way->block) * sizeof *from);
            from = padded;
        }
        arrange_block(kind, from, to);
    }
}

/* n rows of activations, and their sums where there are offsets. */
static void arrange(const matrix *m, const walk *way, desk *d, const bf16 *x, integer stride, integer n) {
    if (m->kind == PLAIN || way->slow) return;
    d->padded = has_offsets(m) ? parts(way->groups, LANES) * LANES : 0;
    for (integer j = 0; j < n; j++, x += stride) {
        number *to = d->x + j * way->blocks * way->block;
        sum_groups(m, way, x, d->padded, d->sums + j * d->padded);
        switch (m->kind) { /* constants, so that each case becomes vectors */
            case INT4:
            case FP4:
            case NF4: arrange_row(INT4, m, way, x, to); break;
            case INT8:
            case UINT8:
            case FP8:
            case Q8_0: arrange_row(INT8, m, way, x, to); break;
            case Q4_0:
            case MXFP4: arrange_row(Q4_0, m, way, x, to); break;
            case Q6_K: arrange_row(Q6_K, m, way, x, to); break;
            default: arrange_row(Q4_K, m, way, x, to);
        }
    }
}

/* One number for each group, of one for each block of columns. */
static void lay(const matrix *m, const walk *way, const float *from, float *to) {
    integer at = 0, across = scales_across(m), repeats = m->block_columns / way->width;
    for (integer i = 0; i < across; i++)
        for (integer k = 0; k < repeats && at < way->groups; k++) to[at++] = from[i];
    integer n = way->blocks * way->per;
    while (at < n) to[at++] = 0; /* behind the last column, where everything is multiplied by zero */
}

/* A row's offsets: what is taken from its codes, times their scales. */
static void read_offsets(const matrix *m, const walk *way, desk *d, int i, integer block) {
    float *offsets = d->offsets[i];
    if (m->zeros && way->laid) {
        read_zeros(m, block, d->spare);
        lay(m, way, d->spare, offsets);
    } else if (m->zeros) {
        read_zeros(m, block, offsets);
    }
    float shift = shifted((int)m->kind) ? shift_of((int)m->kind, m->zeros != 0) : 0.0f;
    for (integer g = 0; g < way->groups && !has_minima(m->kind); g++)
        offsets[g] = ((m->zeros ? offsets[g] : 0.0f) + shift) * d->scales[i][g];
    for (integer g = way->groups; g < d->padded; g++) offsets[g] = 0;
}

/* Read the scales and offsets of a row of weights into place i of the desk, unless they are there. */
static void read(const matrix *m, const walk *way, desk *d, int i, integer row) {
    if (m->kind == PLAIN) return;
    d->of[i] = m;
    d->rows[i] = row;
    integer block = stored(m, row) / m->block_rows;
    if (way->slow || block == d->blocks[i]) return;
    d->blocks[i] = block;
    if (in_blocks(m->kind)) {
        read_groups(m->kind, codes_of(m, row), m->columns, d->scales[i], d->offsets[i]);
    } else {
        __builtin_prefetch(m->scales + block * m->scales_stride + 256); /* some rows on */
        read_scales(m, block, way->laid ? d->spare : d->scales[i]);
        if (way->laid) lay(m, way, d->spare, d->scales[i]);
    }
    if (d->padded) read_offsets(m, way, d, i, block);
}

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

/* Take from a row's sums what its offsets say. */
INLINE floats less_offsets(const desk *d, int i, integer j, floats all) {
    const float *sums = d->sums + j * d->padded, *offsets = d->offsets[i];
    for (integer g = 0; g < d->padded; g += LANES) all -= load_floats(offsets + g) * load_floats(sums + g);
    return all;
}

/* One block of W rows of codes times n_x rows of activations, `x` and a `step` on. */
INLINE void dots_block(const int kind, const int n_x, const int whole, tables t, const byte *codes[W], integer left,
                       const walk *way, const number *x, integer step, integer b, floats sum[2][W][2]) {
    UNROLL for (int i = 0; i < W; i++) {
        values ws[8];
        if (whole) __builtin_prefetch(codes[i] + b * way->bytes + AHEAD);
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

/* The same of numbers that are taken already, in the same order. Two rows of activations at a time, since those of a
   panel come from the second cache, and the four of weights stay in the first. */
INLINE void dots_ready(const int kind, const int one, const desk *d, const walk *way, integer j, integer n_x,
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
                for (integer b = first; b < stop; b++) UNROLL for (int p = set; p < pieces; p += sets) {
                        const number *x = d->x + (j + two) * step + b * way->block + partner(p) * PIECE;
                        values xs[2] = {load_numbers(x), load_numbers(x + step)};
                        ONCE(xs[0]);
                        ONCE(xs[1]);
                        UNROLL for (int i = 0; i < W; i++) {
                            values ws = load_numbers(d->w[i] + (b * pieces + p) * PIECE);
                            UNROLL for (int k = 0; k < 2; k++) sum[i][k] = products(sum[i][k], ws, xs[k]);
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
        take_rows(kind, t, codes, d, way, left);                                                                    \
    }
#define READY(name, kind, one)                                                                                      \
    static void ready_##name(const desk *d, const walk *way, integer j, integer n_x, float out[W][X]) {             \
        dots_ready(kind, one, d, way, j, n_x, out);                                                                 \
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

/* What multiplies rows of a matrix with a panel of activations. */
typedef struct {
    const matrix *m;
    walk way;
    kernels own;
    tables t;
    integer left; /* bytes of a row behind its whole blocks */
    int taken;    /* whether the numbers of weights are taken once for the whole panel, which pays for more than a tile */
} multiplier;

static multiplier multiplier_of(const matrix *m, integer n) {
    multiplier found = {.m = m, .way = walk_of(m)};
    if (m->kind == PLAIN || found.way.slow) return found;
    found.own = kernels_for(m->kind, found.way.per == 1);
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
