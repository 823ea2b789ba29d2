/* Numbers one by one and LANES at a time: bfloat16, the kinds of scales, and vectors as any gcc compiles them. */

#ifndef NUMBERS_H
#define NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define ONCE(vector) __asm__("" : "+v"(vector)) /* load it once: gcc would read memory again for each use */
#elif defined(__AVX2__)
#define ONCE(vector) __asm__("" : "+x"(vector))
#else
#define ONCE(vector)
#endif

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16") /* or the sums would live in memory */
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef uint8_t byte;
typedef int64_t integer;

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float widen(bf16 value) { return float_of((uint32_t)value << 16); }

INLINE bf16 narrow(float value) { /* to nearest, ties to even; not-a-number stays so */
    uint32_t bits = bits_of(value);
    if (value != value) return 0x7fc0;
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE integer least(integer a, integer b) { return a < b ? a : b; }
INLINE integer parts(integer whole, integer part) { return (whole + part - 1) / part; }

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef bf16 halves __attribute__((vector_size(LANES * 2)));
typedef byte bytes __attribute__((vector_size(LANES)));

INLINE floats all_of(float v) { /* written out, for which there is an instruction */
#ifdef __AVX512F__
    return (floats){v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
#else
    return (floats){v, v, v, v, v, v, v, v};
#endif
}
INLINE floats load_floats(const float *from) {
    floats loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}
INLINE floats load_bf16(const bf16 *from) {
    halves loaded;
    memcpy(&loaded, from, sizeof loaded);
    return (floats)(__builtin_convertvector(loaded, words) << 16);
}
INLINE words load_bytes(const byte *from) {
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    bytes loaded;
    memcpy(&loaded, from, sizeof loaded);
    return __builtin_convertvector(__builtin_convertvector(loaded, halves), words);
#endif
}
INLINE words load_halves(const byte *from) {
    halves loaded;
    memcpy(&loaded, from, sizeof loaded);
    return __builtin_convertvector(loaded, words);
}
INLINE floats choose(ints where, floats yes, floats no) { return (floats)(((ints)yes & where) | ((ints)no & ~where)); }

static const float VALUES[3][16] = { /* of codes of 4 bits: INT4, FP4, NF4 */
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6},
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
     1.0f},
};

/* Numbers of fewer bits. The words are those of the bits, without a sign. */
INLINE floats of_e8m0(words e) { /* powers of two: 2 ** (e - 127) */
    return (floats)(e << 23 | ((words)((e == 0) | (e == 255)) & 0x00400000));
}
INLINE floats of_e4m3(words b) { /* below 2 ** -6 the steps are even: 2 ** -6 more than it is, which is taken away */
    words magnitude = b & 0x7f, few = (words)(magnitude < 8);
    floats value = (floats)((magnitude << 20) + (120u << 23) + (few & 1 << 23));
    value -= (floats)(few & 0x3c800000);
    return (floats)((words)value | (b & 0x80) << 24 | ((words)(magnitude == 0x7f) & 0x7fc00000));
}
INLINE floats load_e4m3(const byte *from) {
#if defined(__AVX512F__) && defined(__AVX512VL__) /* as float16 with the same bits it is 256 times less; 480 is none */
    __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
    __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3f80));
    __m256i sign = _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16((short)0x8000));
    floats value = (floats)_mm512_cvtph_ps(_mm256_or_si256(magnitude, sign)) * 256.0f;
    ints none = ((ints)value & 0x7fffffff) == 0x43f00000;
    return (floats)((ints)value | (none & 0x7fc00000));
#else
    return of_e4m3(load_bytes(from));
#endif
}
INLINE floats of_f16(words h) {
    words magnitude = h & 0x7fff;
    floats few = __builtin_convertvector((ints)magnitude, floats) * 0x1p-24f;
    words bits = (words)choose((ints)(magnitude < 0x400), few, (floats)((magnitude << 13) + (112u << 23)));
    bits |= (words)(magnitude >= 0x7c00) & 0x7f800000;
    return (floats)(bits | (h & 0x8000) << 16);
}

/* The bits of bfloat16 in the upper half of each word. */
INLINE words narrowed(floats value) {
    words bits = (words)value;
    bits += 0x7fff + ((bits >> 16) & 1);
    return (words)choose(value == value, (floats)bits, (floats)((words){0} + 0x7fc00000)) & 0xffff0000;
}
INLINE void store_bf16(bf16 *to, floats value) {
    halves stored = __builtin_convertvector(narrowed(value) >> 16, halves);
    memcpy(to, &stored, sizeof stored);
}
INLINE float total(floats all) { /* halves onto halves; the places are written out, or gcc would make them anew */
#ifdef __AVX512F__
    all += __builtin_shuffle(all, (ints){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    all += __builtin_shuffle(all, (ints){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    all += __builtin_shuffle(all, (ints){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
#else
    all += __builtin_shuffle(all, (ints){4, 5, 6, 7, 0, 1, 2, 3});
    all += __builtin_shuffle(all, (ints){2, 3, 0, 1, 6, 7, 4, 5});
#endif
    return all[0] + all[1];
}

#endif
