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

/* Whether a byte has two columns, and whether its low nibbles have scales of their own. */
INLINE int in_nibbles(int kind) { return is_half(kind) || (in_blocks(kind) && kind != Q8_0); }
INLINE int sets_of(int kind) { return kind >= Q4_K ? 2 : 1; }
/* The kind whose values a block's codes have, where there is one. */
INLINE int plainly(int kind) { return kind == Q4_0 ? INT4 : kind == Q8_0 ? INT8 : kind == MXFP4 ? FP4 : kind; }

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && !defined(PORTABLE)

typedef bf16 number; /* an activation */
typedef __m512bh values;
enum { PIECE = 32, NARROW = 0 };

INLINE int block_of(int kind) { return in_nibbles(kind) ? 128 : 64; }
INLINE int grain_of(int kind) { return is_half(kind) ? 8 : 16; }

static bf16 HALF_TABLES[3][2][32]; /* INT4, FP4, NF4: a code's value, and what bfloat16 has left of it */
static bf16 UNSIGNED_TABLE[32];    /* INT4 where blocks have zeros of their own */
static bf16 WIDE_TABLE[96];        /* 0 to 31 for Q5_K, -32 to 31 for Q6_K */
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
    for (int i = 0; i < 96; i++) WIDE_TABLE[i] = narrow((float)(i < 32 ? i : i - 64));
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
    kind = plainly(kind);
    if (kind >= Q5_K) {
        const bf16 *of = WIDE_TABLE + (kind == Q6_K ? 32 : 0);
        return (tables){_mm512_loadu_si512(of), _mm512_loadu_si512(of + 32), _mm512_setzero_si512(), _mm512_setzero_si512()};
    }
    if (kind == Q4_K) kind = INT4, zeros = 1;
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
INLINE int shifted(int kind) { return kind == INT8 || kind == UINT8 || kind == Q8_0; }
INLINE float shift_of(int kind, int zeros) { return kind == UINT8 && zeros ? -127.5f : 0.5f; }

INLINE __m512i load_codes(const byte *from, integer n, int whole) {
    __m512i codes = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(~(__mmask64)0 >> (64 - n), from);
    ONCE(codes);
    return codes;
}

/* Pieces of numbers of a block of codes; the order of columns is that of `arrange_block`. */
INLINE int pieces_of(int kind) { return kind == NF4 ? 8 : in_nibbles(kind) ? 4 : 2; }
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

/* The 64 bytes of codes of block b of a row, which may be of several of ggml's, and of the last row fewer. */
INLINE __m512i gather(const int kind, const byte *row, integer b, integer left, int whole) {
    const int stride = (int)block_bytes_of(kind);
    if (kind >= Q4_K) {
        __m512i codes = _mm512_loadu_si512(row + b / 2 * stride + codes_at(kind) + b % 2 * 64);
        ONCE(codes);
        return codes;
    }
    const int each = kind == Q8_0 ? 32 : 16, n = 64 / each;
    const byte *from = row + b * n * stride + codes_at(kind);
    byte last[64] = {0};
    __m512i codes;
    if (!whole) {
        for (integer i = 0; i < left / stride; i++) memcpy(last + i * each, from + i * stride, (size_t)each);
        codes = _mm512_loadu_si512(last);
    } else if (kind == Q8_0) {
        __m256i low = _mm256_loadu_si256((const __m256i *)from);
        codes = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256((const __m256i *)(from + stride)), 1);
    } else {
        codes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from));
        codes = _mm512_inserti64x2(codes, _mm_loadu_si128((const __m128i *)(from + stride)), 1);
        codes = _mm512_inserti64x2(codes, _mm_loadu_si128((const __m128i *)(from + 2 * stride)), 2);
        codes = _mm512_inserti64x2(codes, _mm_loadu_si128((const __m128i *)(from + 3 * stride)), 3);
    }
    ONCE(codes);
    return codes;
}

/* Fifth and sixth bits: of each word, those of its four codes where the table's index wants them. */
INLINE void decode_wide(const int kind, tables t, const byte *row, integer b, __m512i codes, values to[8]) {
    const byte *from = row + b / 2 * block_bytes_of(kind) + (kind == Q5_K ? 16 : 128 + b % 2 * 32);
    __m512i bits = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)from));
    __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    if (kind == Q5_K) upper = _mm512_add_epi16(upper, _mm512_set1_epi16((short)(b % 2 * 4)));
    bits = _mm512_srlv_epi16(bits, upper);
    __m512i mask = _mm512_set1_epi16(kind == Q5_K ? 0x10 : 0x30);
    __m512i high[4] = {_mm512_slli_epi16(bits, 4), kind == Q5_K ? _mm512_slli_epi16(bits, 3) : bits,
                       _mm512_srli_epi16(bits, 4), _mm512_srli_epi16(bits, kind == Q5_K ? 5 : 8)};
    __m512i low[4] = {codes, _mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8), _mm512_srli_epi16(codes, 12)};
    UNROLL for (int i = 0; i < 4; i++) {
        __m512i at = _mm512_ternarylogic_epi64(mask, high[i], low[i], 0xca); /* mask ? high : low */
        to[i] = (values)(kind == Q5_K ? _mm512_permutexvar_epi16(at, t.a) : _mm512_permutex2var_epi16(t.a, at, t.b));
    }
}

/* The numbers of block b of a row, of which `left` bytes are left where it is not whole. */
INLINE void take(const int kind, tables t, const byte *row, integer b, integer left, int whole, values to[8]) {
    const int bytes = in_nibbles(kind) ? block_of(kind) / 2 : block_of(kind);
    if (!in_blocks(kind))
        decode(kind, t, load_codes(row + b * bytes, left, whole), to);
    else if (kind >= Q5_K)
        decode_wide(kind, t, row, b, gather(kind, row, b, left, whole), to);
    else
        decode(kind == Q8_0 ? INT8 : INT4, t, gather(kind, row, b, left, whole), to);
}

INLINE values load_numbers(const number *from) { /* as what it is: gcc takes a detour through memory for a cast */
    values loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}
INLINE void store_numbers(number *to, values from) { memcpy(to, &from, sizeof from); }
INLINE floats products(floats so_far, values a, values b) { return (floats)_mm512_dpbf16_ps((__m512)so_far, a, b); }

/* Scales of lanes: `per` of them belong to a block, of which a set has some. */
INLINE ints spread_of(int kind, integer per, int set) {
    ints at;
    for (int i = 0; i < LANES; i++)
        at[i] = kind == Q6_K ? i / 4 + 4 * set : kind >= Q4_K ? i / 8 * 2 + set : (int)(i * per / LANES);
    return at;
}
INLINE floats spread(const float *from, int one, ints at) {
    return one ? all_of(*from) : (floats)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(from));
}

/* A block of activations in the order of a block's numbers. */
INLINE void arrange_block(const int kind, const bf16 *restrict from, number *restrict to) {
    if (is_half(kind)) {
        for (int i = 0; i < 32; i++)
            for (int k = 0; k < 4; k++) to[k * 32 + i] = from[4 * i + k];
    } else if (in_nibbles(kind)) {
        const int run = (int)run_of(kind);
        for (int r = 0; r < 64 / run; r++, from += 2 * run, to += run / 2)
            for (int i = 0; i < run / 2; i++)
                for (int k = 0; k < 4; k++) to[k * 32 + i] = from[2 * i + k / 2 + k % 2 * run];
    } else {
        for (int k = 0; k < 8; k++) memcpy(to + k / 2 * 8 + k % 2 * 32, from + 8 * k, 16);
    }
}
INLINE integer first_column(int kind, integer b) { return b * block_of(kind); }

#else
typedef float number;
typedef floats values;
enum { PIECE = LANES, NARROW = 1 }; /* scales of lanes are either one for all, or one for each */

INLINE int block_of(int kind) { return in_nibbles(kind) ? 2 * LANES : LANES; }
INLINE int grain_of(int kind) { return is_half(kind) ? 2 : 1; }

typedef sixteen tables; /* or what stands for zero, of 8 bits */

INLINE tables tables_of(int kind, int zeros) {
    kind = plainly(kind);
    floats middle = all_of(zeros ? 0.0f : middle_of(kind));
    tables found = {middle, middle};
    if (kind == Q4_K) kind = INT4;
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

INLINE int pieces_of(int kind) { return in_nibbles(kind) ? 2 : 1; }
INLINE int partner(int piece) { return piece; }

INLINE int shifted(int kind) { return kind < 0; }
INLINE float shift_of(int kind, int zeros) {
    (void)kind, (void)zeros;
    return 0.0f;
}

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

/* Fifth and sixth bits: byte j of a run has those of its low nibble, and further up those of its high one. */
INLINE void decode_wide(const int kind, const byte *block, integer j, words codes, values to[8]) {
    const byte *from = block + (kind == Q5_K ? 16 : 128 + j / 64 * 32) + j % 32;
    const uint32_t mask = kind == Q5_K ? 1 : 3;
    words bits = load_bytes(from) >> (uint32_t)(kind == Q5_K ? j / 32 * 2 : j % 64 / 32 * 2);
    words low = (codes & 15) | (bits & mask) << 4;
    words high = codes >> 4 | (bits >> (kind == Q5_K ? 1 : 4) & mask) << 4;
    ints middle = (ints){0} + (kind == Q6_K ? 32 : 0);
    to[0] = __builtin_convertvector((ints)low - middle, floats);
    to[1] = __builtin_convertvector((ints)high - middle, floats);
}

/* The numbers of block b of a row, of which `left` bytes are left where it is not whole. */
INLINE void take(const int kind, tables t, const byte *row, integer b, integer left, int whole, values to[8]) {
    if (!in_blocks(kind)) {
        decode(kind, t, load_codes(row + b * LANES, left, whole), to);
        return;
    }
    const integer each = in_nibbles(kind) ? block_columns_of(kind) / 2 : block_columns_of(kind); /* bytes of codes */
    const byte *block = row + b * LANES / each * block_bytes_of(kind);
    integer j = b * LANES % each;
    words codes = load_codes(block + codes_at(kind) + j, LANES, 1);
    if (kind >= Q5_K)
        decode_wide(kind, block, j, codes, to);
    else
        decode(kind == Q8_0 ? INT8 : INT4, t, codes, to);
}

INLINE values load_numbers(const number *from) { return load_floats(from); }
INLINE void store_numbers(number *to, values from) { memcpy(to, &from, sizeof from); }
INLINE floats products(floats so_far, values a, values b) { return so_far + a * b; }

INLINE ints spread_of(int kind, integer per, int set) {
    (void)kind, (void)per, (void)set;
    return (ints){0};
}
INLINE floats spread(const float *from, int one, ints at) {
    (void)at;
    return one ? all_of(*from) : load_floats(from);
}

INLINE void arrange_block(const int kind, const bf16 *restrict from, number *restrict to) {
    if (in_nibbles(kind)) {
        const int apart = is_half(kind) ? 1 : (int)run_of(kind), step = is_half(kind) ? 2 : 1;
        for (int i = 0; i < LANES; i++) {
            to[i] = widen(from[step * i]);
            to[LANES + i] = widen(from[step * i + apart]);
        }
    } else {
        for (int i = 0; i < LANES; i++) to[i] = widen(from[i]);
    }
}
INLINE integer first_column(int kind, integer b) {
    if (!in_blocks(kind) || kind == Q8_0) return b * block_of(kind);
    return b * LANES / run_of(kind) * 2 * run_of(kind) + b * LANES % run_of(kind);
}
#endif

#endif
