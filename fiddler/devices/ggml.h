/* GGUF's blocks of codes and scales, as ggml-common.h of llama.cpp has them: their scales, and a row as numbers.

   A block has 32 columns and one scale, or 256 columns with a float16 scale of the scales of 6 or 8 bits of its
   groups. Low nibbles of some bytes (`run_of`) are neighbours, and the high nibbles are the neighbours behind them. */

#ifndef GGML_H
#define GGML_H

#include "numbers.h"

enum { Q4_0 = 7, Q8_0, MXFP4, Q4_K, Q5_K, Q6_K }; /* behind the kinds of matrix.h */

INLINE int in_blocks(integer kind) { return kind >= Q4_0; }
INLINE int has_minima(integer kind) { return kind == Q4_K || kind == Q5_K; }
INLINE integer block_columns_of(integer kind) { return kind >= Q4_K ? 256 : 32; }
INLINE integer block_bytes_of(integer kind) {
    return kind == Q4_0 ? 18 : kind == Q8_0 ? 34 : kind == MXFP4 ? 17 : kind == Q4_K ? 144 : kind == Q5_K ? 176 : 210;
}
INLINE integer group_of(integer kind) { return kind == Q6_K ? 16 : 32; } /* columns that share a scale */
INLINE integer run_of(integer kind) { return kind == Q6_K ? 64 : kind >= Q4_K ? 32 : 16; }
/* Where the first codes of a block lie: those of 4 bits, or the lower four of 5 and 6. */
INLINE integer codes_at(integer kind) {
    return kind == MXFP4 ? 1 : kind <= Q8_0 ? 2 : kind == Q4_K ? 16 : kind == Q5_K ? 48 : 0;
}

INLINE float one_f16(const byte *from) {
    uint16_t bits;
    memcpy(&bits, from, sizeof bits);
#ifdef __F16C__
    return _cvtsh_ss(bits);
#else
    return of_f16((words){0} + bits)[0];
#endif
}
INLINE uint32_t word_at(const byte *from) {
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}
INLINE void store_eight(float *to, uint64_t each, float scale) { /* of numbers of 8 bits with a sign */
#ifdef __AVX2__
    __m256 found = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)each)));
    _mm256_storeu_ps(to, _mm256_mul_ps(found, _mm256_set1_ps(scale)));
#else
    for (int i = 0; i < 8; i++) to[i] = (float)(int8_t)(each >> 8 * i) * scale;
#endif
}

/* Scales and minima of eight groups, of 6 bits each in 12 bytes: those of groups 4 to 7 have their low four bits in the
   last four bytes, and their high two above the six of groups 0 to 3. */
INLINE void read_six_bits(const byte *block, float *scales, float *minima) {
    uint32_t a = word_at(block + 4), b = word_at(block + 8), c = word_at(block + 12);
    uint64_t low = a & 0x3f3f3f3f, high = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
    store_eight(scales, low | high << 32, one_f16(block));
    low = b & 0x3f3f3f3f, high = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
    store_eight(minima, low | high << 32, one_f16(block + 2));
}

INLINE void read_groups_of(const int kind, const byte *row, integer n, float *scales, float *minima) {
    for (integer i = 0; i < n; i++, row += block_bytes_of(kind))
        if (kind == Q6_K) {
            for (int k = 0; k < 2; k++) {
                uint64_t each;
                memcpy(&each, row + 192 + 8 * k, sizeof each);
                store_eight(scales + 16 * i + 8 * k, each, one_f16(row + 208));
            }
        } else if (has_minima(kind)) {
            read_six_bits(row, scales + 8 * i, minima + 8 * i);
        } else if (kind == MXFP4) {
            scales[i] = float_of((uint32_t)*row << 23 | (*row == 0 || *row == 255 ? 0x00400000 : 0));
        } else {
            scales[i] = one_f16(row);
        }
}

/* The scales of a row of blocks, group by group, and the minima that are taken away where its kind has them. */
static void read_groups(integer kind, const byte *row, integer columns, float *scales, float *minima) {
    integer n = columns / block_columns_of(kind);
    switch (kind) { /* constants, so that each case is a loop of its own */
        case Q4_0: read_groups_of(Q4_0, row, n, scales, minima); break;
        case Q8_0: read_groups_of(Q8_0, row, n, scales, minima); break;
        case MXFP4: read_groups_of(MXFP4, row, n, scales, minima); break;
        case Q4_K: read_groups_of(Q4_K, row, n, scales, minima); break;
        case Q5_K: read_groups_of(Q5_K, row, n, scales, minima); break;
        default: read_groups_of(Q6_K, row, n, scales, minima);
    }
}

/* The low nibbles of a run of bytes, then the high ones. */
INLINE void part_nibbles(const int run, const int n_bytes, const byte *restrict codes, byte *restrict to) {
    for (int i = 0; i < n_bytes / run; i++, codes += run, to += 2 * run)
        for (int j = 0; j < run; j++) to[j] = codes[j] & 15, to[run + j] = codes[j] >> 4;
}

/* The codes of a block, column by column. */
INLINE void part_codes(const int kind, const byte *restrict block, byte *restrict to) {
    const byte *codes = block + codes_at(kind);
    if (kind == Q8_0) {
        memcpy(to, codes, 32);
        return;
    }
    part_nibbles((int)run_of(kind), (int)block_columns_of(kind) / 2, codes, to);
    if (kind == Q5_K)
        for (int k = 0; k < 8; k++)
            for (int j = 0; j < 32; j++) to[32 * k + j] |= (byte)((block[16 + j] >> k & 1) << 4);
    if (kind == Q6_K)
        for (int k = 0; k < 8; k++)
            for (int j = 0; j < 32; j++)
                to[32 * k + j] |= (byte)((block[128 + k / 4 * 32 + j] >> k % 4 * 2 & 3) << 4);
}

INLINE void read_blocks_of(const int kind, const byte *row, integer columns, float factor, const float *scales,
                           const float *minima, float *to) {
    const int wide = (int)block_columns_of(kind), group = (int)group_of(kind);
    const float middle = kind == Q4_0 ? 8.0f : kind == Q6_K ? 32.0f : 0.0f;
    for (integer c = 0; c < columns; c += wide, row += block_bytes_of(kind)) {
        byte codes[256];
        part_codes(kind, row, codes);
        for (int g = 0; g < wide / group; g++, scales++, minima++)
            for (int j = 0; j < group; j++) {
                byte code = codes[g * group + j];
                float value = kind == MXFP4 ? VALUES[1][code] : kind == Q8_0 ? (float)(int8_t)code : (float)code - middle;
                *to++ = (has_minima(kind) ? value * *scales - *minima : value * *scales) * factor;
            }
    }
}

/* A row as numbers; room holds two floats a group. */
static void read_blocks(integer kind, const byte *row, integer columns, float factor, float *room, float *to) {
    float *minima = room + columns / group_of(kind);
    read_groups(kind, row, columns, room, minima);
    switch (kind) { /* constants, so that each case becomes vectors */
        case Q4_0: read_blocks_of(Q4_0, row, columns, factor, room, minima, to); break;
        case Q8_0: read_blocks_of(Q8_0, row, columns, factor, room, minima, to); break;
        case MXFP4: read_blocks_of(MXFP4, row, columns, factor, room, minima, to); break;
        case Q4_K: read_blocks_of(Q4_K, row, columns, factor, room, minima, to); break;
        case Q5_K: read_blocks_of(Q5_K, row, columns, factor, room, minima, to); break;
        default: read_blocks_of(Q6_K, row, columns, factor, room, minima, to);
    }
}

#endif
