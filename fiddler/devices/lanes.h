/* Codes to numbers, as this machine multiplies them: a block of codes at a time.

   A block is one load of codes. Its numbers come in pieces, each a vector, in an order that costs nothing: activations
   are put into the same order once (`arrange`). Each lane of the sums of products belongs to neighbouring columns, so
   that a scale of `grain` columns or more is a matter of lanes.

   With AVX-512's bf16 products and byte permutations, numbers become bfloat16, all of them exactly (NF4 as a sum of
   two). Elsewhere, they become float32 in vectors as any gcc compiles them. */

#ifndef LANES_H
#define LANES_H

#include "matrix.h"

/* Values of codes of 4 bits, in float32. */
typedef struct { floats a, b; } sixteen;

INLINE sixteen sixteen_of(int kind) {
    const float *values = VALUES[kind - INT4];
    return (sixteen){load_floats(values), load_floats(values + 16 - LANES)};
}
INLINE floats look_up(sixteen t, words codes) {
#ifdef __AVX512F__
    return __builtin_shuffle(t.a, (ints)codes);
#else
    return __builtin_shuffle(t.a, t.b, (ints)codes);
#endif
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && !defined(PORTABLE)

typedef bf16 number; /* an activation */
typedef __m512bh values;
enum { PIECE = 32, NARROW = 0 };

INLINE int block_of(int kind) { return is_half(kind) ? 128 : 64; }
INLINE int grain_of(int kind) { return is_half(kind) ? 8 : 16; }

static bf16 HALF_TABLES[3][2][32]; /* INT4, FP4, NF4: a code's value, and what bfloat16 has left of it */
static bf16 UNSIGNED_TABLE[32];    /* INT4 where blocks have zeros of their own */
static byte BYTE_TABLES[2][2][128]; /* INT8 and FP8 without their sign: lower and upper byte of bfloat16 */

__attribute__((constructor)) static void fill_tables(void) {
    for (int i = 0; i < 32; i++) { /* twice, for a fifth bit of the index belongs to the next code */
        for (int kind = 0; kind < 3; kind++) {
            float value = VALUES[kind][i % 16] - middle_of(INT4 + kind);
            HALF_TABLES[kind][0][i] = narrow(value);
            HALF_TABLES[kind][1][i] = narrow(value - widen(narrow(value)));
        }
        UNSIGNED_TABLE[i] = narrow((float)(i % 16));
    }
    for (int i = 0; i < 128; i++) {
        bf16 values[2] = {narrow((float)i + 0.5f), narrow(of_e4m3((words){0} + (uint32_t)i)[0])};
        for (int kind = 0; kind < 2; kind++) {
            BYTE_TABLES[kind][0][i] = (byte)values[kind];
            BYTE_TABLES[kind][1][i] = (byte)(values[kind] >> 8);
        }
    }
}

typedef struct { __m512i a, b, c, d; } tables;

INLINE tables tables_of(int kind, int zeros) {
    if (is_half(kind)) {
        const bf16(*of)[32] = HALF_TABLES[kind - INT4];
        return (tables){_mm512_loadu_si512(zeros ? UNSIGNED_TABLE : of[0]), _mm512_loadu_si512(of[1]),
                        _mm512_setzero_si512(), _mm512_setzero_si512()};
    }
    const byte(*of)[128] = BYTE_TABLES[kind == FP8];
    return (tables){_mm512_loadu_si512(of[0]), _mm512_loadu_si512(of[0] + 64), _mm512_loadu_si512(of[1]),
                    _mm512_loadu_si512(of[1] + 64)};
}

/* What stands for zero besides a block's own. An integer n of 8 bits is taken for n + 1/2, so that n and -1 - n differ
   in their sign alone, and one without a sign for 128 less. */
INLINE int shifted(int kind) { return kind == INT8 || kind == UINT8; }
INLINE floats shift_of(int kind, int zeros) { return all_of(kind == UINT8 && zeros ? -127.5f : 0.5f); }

INLINE __m512i load_codes(const byte *from, integer n, int whole) {
    __m512i codes = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(~(__mmask64)0 >> (64 - n), from);
    ONCE(codes);
    return codes;
}

/* Pieces of numbers of a block of codes; the order of columns is that of `arrange_block`. */
INLINE int pieces_of(int kind) { return kind == NF4 ? 8 : is_half(kind) ? 4 : 2; }
/* The piece of activations that a piece of numbers is multiplied with. */
INLINE int partner(int piece) { return piece % 4; }

INLINE void decode(int kind, tables t, __m512i codes, values to[8]) {
    if (is_half(kind)) {
        __m512i each[4] = {codes, _mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8), _mm512_srli_epi16(codes, 12)};
        UNROLL for (int i = 0; i < 4; i++) {
            to[i] = (values)_mm512_permutexvar_epi16(each[i], t.a);
            if (kind == NF4) to[4 + i] = (values)_mm512_permutexvar_epi16(each[i], t.b);
        }
        return;
    }
    __m512i sign = _mm512_set1_epi8((char)0x80), at = codes;
    if (kind == UINT8) at = codes = _mm512_xor_si512(codes, sign);
    if (kind != FP8) at = _mm512_max_epi8(codes, _mm512_ternarylogic_epi32(codes, codes, codes, 0x0f)); /* or not codes */
    __m512i lower = _mm512_permutex2var_epi8(t.a, at, t.b), upper = _mm512_permutex2var_epi8(t.c, at, t.d);
    upper = _mm512_ternarylogic_epi32(upper, codes, sign, 0xf8); /* a | (b & c) */
    to[0] = (values)_mm512_unpacklo_epi8(lower, upper);
    to[1] = (values)_mm512_unpackhi_epi8(lower, upper);
}

INLINE values load_numbers(const number *from) { return (values)_mm512_loadu_si512(from); }
INLINE values ones(void) { return (values)_mm512_set1_epi16(0x3f80); }
INLINE floats products(floats so_far, values a, values b) { return (floats)_mm512_dpbf16_ps((__m512)so_far, a, b); }

/* Scales of lanes: `per` of them belong to a block. */
INLINE ints spread_of(integer per) {
    ints at;
    for (int i = 0; i < LANES; i++) at[i] = (int)(i * per / LANES);
    return at;
}
INLINE floats spread(const float *from, int one, ints at) {
    return one ? all_of(*from) : (floats)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(from));
}

/* A block of activations in the order of a block's numbers. */
INLINE void arrange_block(int half, const bf16 *restrict from, number *restrict to) {
    if (half) {
        for (int i = 0; i < 32; i++)
            for (int k = 0; k < 4; k++) to[k * 32 + i] = from[4 * i + k];
    } else {
        for (int k = 0; k < 8; k++) memcpy(to + k / 2 * 8 + k % 2 * 32, from + 8 * k, 16);
    }
}

#else
typedef float number;
typedef floats values;
enum { PIECE = LANES, NARROW = 1 }; /* scales of lanes are either one for all, or one for each */

INLINE int block_of(int kind) { return is_half(kind) ? 2 * LANES : LANES; }
INLINE int grain_of(int kind) { return is_half(kind) ? 2 : 1; }

typedef sixteen tables; /* or what stands for zero, of 8 bits */

INLINE tables tables_of(int kind, int zeros) {
    floats middle = all_of(zeros ? 0.0f : middle_of(kind));
    tables found = {middle, middle};
    if (is_half(kind)) found = sixteen_of(kind), found.a -= middle, found.b -= middle;
    return found;
}

INLINE words load_codes(const byte *from, integer n, int whole) {
    byte padded[LANES] = {0};
    if (!whole) from = memcpy(padded, from, (size_t)n);
    words codes = load_bytes(from);
    ONCE(codes);
    return codes;
}

INLINE int pieces_of(int kind) { return is_half(kind) ? 2 : 1; }
INLINE int partner(int piece) { return piece; }

INLINE int shifted(int kind) { return kind < 0; }
INLINE floats shift_of(int kind, int zeros) { return all_of(0.0f * (kind + zeros)); }

INLINE void decode(int kind, tables t, words codes, values to[8]) {
    if (is_half(kind)) {
        to[0] = look_up(t, codes & 15);
        to[1] = look_up(t, codes >> 4);
    } else if (kind == FP8) {
        to[0] = of_e4m3(codes);
    } else {
        ints value = (ints)codes;
        if (kind == INT8) value = (value ^ 128) - 128;
        to[0] = __builtin_convertvector(value, floats);
        if (kind == UINT8) to[0] -= t.a;
    }
}

INLINE values load_numbers(const number *from) { return load_floats(from); }
INLINE values ones(void) { return all_of(1.0f); }
INLINE floats products(floats so_far, values a, values b) { return so_far + a * b; }

INLINE ints spread_of(integer per) { return (ints){0} + (int)per; }
INLINE floats spread(const float *from, int one, ints at) {
    (void)at;
    return one ? all_of(*from) : load_floats(from);
}

INLINE void arrange_block(int half, const bf16 *restrict from, number *restrict to) {
    if (half) {
        for (int i = 0; i < LANES; i++) {
            to[i] = widen(from[2 * i]);
            to[LANES + i] = widen(from[2 * i + 1]);
        }
    } else {
        for (int i = 0; i < LANES; i++) to[i] = widen(from[i]);
    }
}
#endif

#endif
