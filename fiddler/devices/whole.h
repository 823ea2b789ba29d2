/* A matrix as bfloat16, for so many rows of activations that a dense product is faster. */

#ifndef WHOLE_H
#define WHOLE_H

#include "dots.h"

/* Columns that a vector of codes has. */
INLINE integer span_of(const matrix *m) { return is_half(m->kind) ? 2 * LANES : LANES; }

/* Whether the scales of a vector of codes are the same pattern of lanes everywhere. */
static int regular(const matrix *m) {
    integer span = span_of(m), block = m->block_columns;
    return block >= m->columns || block % span == 0 || (span % block == 0 && block % 2 == 0);
}

/* A vector of codes as numbers; of 4 bits, even and odd columns. */
INLINE void numbers_of(const int kind, sixteen t, words codes, floats zero, floats scale, floats to[2]) {
    if (is_half(kind)) {
        to[0] = (look_up(t, codes & 15) - zero) * scale;
        to[1] = (look_up(t, codes >> 4) - zero) * scale;
    } else if (kind == FP8) {
        to[0] = of_e4m3(codes) * scale;
    } else {
        ints value = (ints)codes;
        if (kind == INT8) value = (value ^ 128) - 128;
        to[0] = (__builtin_convertvector(value, floats) - zero) * scale;
    }
}

INLINE void expand_row(const int kind, const matrix *m, integer row, const desk *d, bf16 *to) {
    const byte *codes = codes_of(m, row);
    const float *scales = d->scales[0], *zeros = d->offsets[0];
    integer span = span_of(m), block = m->block_columns, columns = m->columns, bytes_left = row_bytes(m);
    sixteen t = {{0}, {0}};
    ints at = {0};
    if (is_half(kind)) t = sixteen_of((int)m->kind);
    for (int i = 0; i < LANES; i++) at[i] = block < span ? (int)(i * span / LANES / block) : 0;
    for (integer c = 0; c < columns; c += span, codes += LANES, bytes_left -= LANES) {
        byte padded[LANES] = {0};
        bf16 tail[2 * LANES];
        const byte *from = bytes_left < LANES ? memcpy(padded, codes, (size_t)bytes_left) : codes;
        integer first = block >= columns ? 0 : c / block;
        floats scale = __builtin_shuffle(load_floats(scales + first), at), number[2], zero = all_of(middle_of(m->kind));
        if (m->zeros) zero = __builtin_shuffle(load_floats(zeros + first), at);
        numbers_of(kind, t, load_bytes(from), zero, scale, number);
        if (is_half(kind)) {
            words pairs = (narrowed(number[0]) >> 16) | narrowed(number[1]);
            memcpy(tail, &pairs, sizeof pairs);
        } else {
            store_bf16(tail, number[0]);
        }
        memcpy(to + c, tail, (size_t)least(span, columns - c) * sizeof *to);
    }
}

/* Rows start to stop of y [rows, columns]. */
static void expand(const matrix *m, bf16 *y, integer start, integer stop, desk *d) {
    float factor = factor_of(m);
    integer known = -1;
    for (integer row = start; row < stop; row++) {
        bf16 *to = y + row * m->columns;
        if (m->kind == PLAIN) {
            memcpy(to, codes_of(m, row), (size_t)m->columns * sizeof *to);
            continue;
        }
        if (in_blocks(m->kind) || !regular(m)) {
            read_row(m, row, factor, d->scales[0], d->spare);
            integer i = 0;
            for (; i + LANES <= m->columns; i += LANES) store_bf16(to + i, load_floats(d->spare + i));
            for (; i < m->columns; i++) to[i] = narrow(d->spare[i]);
            continue;
        }
        integer block = stored(m, row) / m->block_rows;
        if (block != known) {
            known = block;
            read_scales(m, block, d->scales[0]);
            for (integer i = 0; i < scales_across(m); i++) d->scales[0][i] *= factor;
            if (m->zeros) read_zeros(m, block, d->offsets[0]);
        }
        switch (m->kind) { /* constants, so that each case becomes vectors */
            case INT4:
            case FP4:
            case NF4: expand_row(INT4, m, row, d, to); break;
            case INT8: expand_row(INT8, m, row, d, to); break;
            case UINT8: expand_row(UINT8, m, row, d, to); break;
            default: expand_row(FP8, m, row, d, to);
        }
    }
}

#endif
