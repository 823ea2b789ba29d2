/* A thread's working memory: a panel of activations in the order of a matrix's numbers, and the scales of some rows of
   weights in float32. */

#ifndef DESK_H
#define DESK_H

#include "lanes.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum { W = 4, X = 4 };  /* A tile: rows of weights by rows of activations. */
enum { PANEL = 16 };    /* Activations that are arranged at a time. */
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
    const byte *next[W];    /* the next rows of codes, to be prefetched */
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

/* A row's offsets: the zeros of its groups times their scales; minima are offsets as they are. */
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
    d->next[i] = codes_of(m, row) + m->step * m->stride;
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

#endif
