/* A matrix of weights as Python describes it, and a row of it as numbers.

   The order of the fields is that of `_MATRIX` in native.py, and the kinds' numbers are those there. */

#ifndef MATRIX_H
#define MATRIX_H

#include "ggml.h"

enum { PLAIN, INT4, FP4, NF4, INT8, UINT8, FP8 };     /* bfloat16, or codes; then those of ggml.h */
enum { FLOAT32, BFLOAT16, FLOAT16, E4M3, E8M0 };      /* scales */

typedef struct {
    const byte *codes, *scales, *zeros; /* zeros may be absent: 8 and 128 then stand for zero, of INT4 and UINT8 */
    integer codes_bytes, scales_bytes, zeros_bytes;    /* that may be read from there */
    integer stride, scales_stride, zeros_stride;       /* bytes from a row to the next */
    integer first, step;                               /* row r lies in row first + r * step */
    integer rows, columns, block_rows, block_columns;
    integer kind, scale_kind;
    double factor;
    const bf16 *bias; /* or none */
    integer bias_stride;
} matrix;

INLINE int is_half(integer kind) { return kind >= INT4 && kind <= NF4; }
INLINE integer row_bytes(const matrix *m) {
    if (in_blocks(m->kind)) return m->columns / block_columns_of(m->kind) * block_bytes_of(m->kind);
    return m->kind == PLAIN ? 2 * m->columns : is_half(m->kind) ? parts(m->columns, 2) : m->columns;
}
INLINE integer scale_bytes(const matrix *m) { return m->scale_kind == FLOAT32 ? 4 : m->scale_kind < E4M3 ? 2 : 1; }
INLINE integer scales_across(const matrix *m) { return parts(m->columns, m->block_columns); }

INLINE integer stored(const matrix *m, integer row) { return m->first + row * m->step; }
INLINE const byte *codes_of(const matrix *m, integer row) { return m->codes + stored(m, row) * m->stride; }
INLINE float factor_of(const matrix *m) { return m->kind == PLAIN ? 1.0f : (float)m->factor; }
INLINE float bias_of(const matrix *m, integer row) { return m->bias ? widen(m->bias[row * m->bias_stride]) : 0.0f; }

/* Whether everything that a matrix needs lies where reading is allowed. */
static int holds(const matrix *m, integer rows, integer columns) {
    integer last = m->rows - 1;
    if (m->rows != rows || m->columns != columns || rows < 1 || columns < 1 || m->first < 0 || m->step < 1) return 0;
    if (m->stride < 0 || m->kind < PLAIN || m->kind > Q6_K) return 0;
    if (stored(m, last) * m->stride + row_bytes(m) > m->codes_bytes) return 0;
    if (m->kind == PLAIN) return 1;
    if (in_blocks(m->kind)) return m->columns % block_columns_of(m->kind) == 0;
    if (m->block_rows < 1 || m->block_columns < 1 || m->scales_stride < 0 || m->zeros_stride < 0) return 0;
    integer block = stored(m, last) / m->block_rows, across = scales_across(m);
    if (m->scale_kind < FLOAT32 || m->scale_kind > E8M0) return 0;
    if (block * m->scales_stride + across * scale_bytes(m) > m->scales_bytes) return 0;
    return !m->zeros || block * m->zeros_stride + across <= m->zeros_bytes;
}

/* Whether rows of both can make a tile. */
static int alike(const matrix *a, const matrix *b) {
    return a->kind == b->kind && !a->zeros == !b->zeros && a->block_columns == b->block_columns;
}

INLINE floats scales_of(integer kind, const byte *from) {
    switch (kind) {
        case FLOAT32: return load_floats((const float *)from);
        case BFLOAT16: return (floats)(load_halves(from) << 16);
        case FLOAT16: return of_f16(load_halves(from));
        case E4M3: return load_e4m3(from);
        default: return of_e8m0(load_bytes(from));
    }
}

/* n scales, or zeros where size is that of none, in float32, and some finite numbers behind them. */
INLINE void widen_all(integer kind, integer size, const byte *from, integer n, float *to) {
    for (integer i = 0; i < n; i += LANES) {
        byte padded[4 * LANES] = {0};
        const byte *at = from + i * size;
        if (n - i < LANES) at = memcpy(padded, at, (size_t)((n - i) * size));
        floats found = kind < 0 ? __builtin_convertvector((ints)load_bytes(at), floats) : scales_of(kind, at);
        memcpy(to + i, &found, sizeof found);
    }
}

/* The scales of a row of blocks. */
static void read_scales(const matrix *m, integer block, float *to) {
    const byte *from = m->scales + block * m->scales_stride;
    integer n = scales_across(m);
    switch (m->scale_kind) { /* constants, so that each case becomes vectors */
        case FLOAT32: widen_all(FLOAT32, 4, from, n, to); break;
        case BFLOAT16: widen_all(BFLOAT16, 2, from, n, to); break;
        case FLOAT16: widen_all(FLOAT16, 2, from, n, to); break;
        case E4M3: widen_all(E4M3, 1, from, n, to); break;
        default: widen_all(E8M0, 1, from, n, to);
    }
}

/* What stands for zero in a row of blocks. */
static void read_zeros(const matrix *m, integer block, float *to) {
    widen_all(-1, 1, m->zeros + block * m->zeros_stride, scales_across(m), to);
}

/* What is taken from a value where a block has no zero of its own. */
INLINE float middle_of(integer kind) { return kind == INT4 ? 8.0f : kind == UINT8 ? 128.0f : 0.0f; }

/* A code's value, before zeros and scales. */
static float value_of(integer kind, const byte *codes, integer column) {
    if (is_half(kind)) return VALUES[kind - INT4][codes[column / 2] >> (column % 2 ? 4 : 0) & 15];
    byte code = codes[column];
    return kind == FP8 ? of_e4m3((words){0} + code)[0] : kind == INT8 ? (float)(int8_t)code : (float)code;
}

/* A row in float32, of any kind and block: slow. room holds two floats a column, and a vector. */
static void read_row(const matrix *m, integer row, float factor, float *room, float *to) {
    const byte *codes = codes_of(m, row);
    if (in_blocks(m->kind)) {
        read_blocks(m->kind, codes, m->columns, factor, room, to);
        return;
    }
    integer block = stored(m, row) / m->block_rows;
    float *scales = room, *zeros = room + m->columns + LANES;
    read_scales(m, block, scales);
    if (m->zeros) read_zeros(m, block, zeros);
    for (integer i = 0; i < m->columns; i++) {
        integer at = i / m->block_columns;
        float zero = m->zeros ? zeros[at] : middle_of(m->kind);
        to[i] = (value_of(m->kind, codes, i) - zero) * (scales[at] * factor);
    }
}

#endif
