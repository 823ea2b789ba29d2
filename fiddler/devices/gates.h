/* What lies between an expert's up and down: an activation, and what it gates, rounded after each operation as torch
   rounds bfloat16. The fields are those of `_GATE` in native.py, and the kinds' numbers those of gates.py. */

#ifndef GATES_H
#define GATES_H

#include "numbers.h"

enum { SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID };

typedef struct {
    integer kind;
    integer gated; /* activation(gate) * up, or activation(up) */
    integer after; /* whether the gate's limit holds after the activation, not before it */
    double limit;  /* of gate from above, and of up from both sides; or infinite */
    double slope;  /* SIGMOID: gate * sigmoid(slope * gate) */
    double shift;  /* added to up */
} gate_formula;

/* exp, to two units in the last place (the series after Cody and Waite's reduction); 88 and more is e ** 88. */
INLINE floats exponential(floats x) {
    x = choose(x > 88.0f, all_of(88.0f), x);
    x = choose(x < -87.0f, all_of(-87.0f), x);
    floats shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* the nearest whole number */
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats series = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.0083333333f
                    + r * (0.0013888889f + r * 1.9841270e-4f))))));
    return (floats)((words)series + ((words)shifted << 23));
}

INLINE floats rounded(floats value) { return (floats)narrowed(value); }
INLINE floats most(floats value, float limit) { return choose(value > limit, all_of(limit), value); }
INLINE floats between(floats value, float limit) {
    value = most(value, limit);
    return choose(value < -limit, all_of(-limit), value);
}
INLINE floats positive(floats value) { return choose(value < 0.0f, all_of(0.0f), value); }

INLINE floats activated(const gate_formula *g, floats value) {
    floats cube, found;
    switch (g->kind) {
        case SILU: return value / (1.0f + exponential(-value));
        case GELU_TANH: /* 1 + tanh(z) is 2 / (1 + exp(-2 z)) */
            cube = value * value * value;
            return value / (1.0f + exponential(-1.5957691f * (value + 0.044715f * cube)));
        case GELU:
            for (int i = 0; i < LANES; i++) found[i] = value[i] * 0.5f * (1.0f + erff(value[i] * 0.70710678f));
            return found;
        case RELU: return positive(value);
        case RELU2: return positive(value) * positive(value);
        default: return value * rounded(1.0f / (1.0f + exponential(-rounded(value * (float)g->slope))));
    }
}

INLINE floats gated(const gate_formula *g, floats first, floats up) {
    float limit = (float)g->limit;
    if (!g->after) first = most(first, limit);
    floats active = rounded(activated(g, first));
    if (!g->gated) return active;
    if (g->after) active = most(active, limit);
    up = between(up, limit);
    if (g->shift != 0.0) up = rounded(up + (float)g->shift);
    return rounded(active * up);
}

/* n values of bfloat16, in place of the first. */
static void apply(const gate_formula *g, bf16 *first, const bf16 *up, integer n) {
    integer i = 0;
    for (; i + LANES <= n; i += LANES) store_bf16(first + i, gated(g, load_bf16(first + i), load_bf16(up + i)));
    if (i < n) {
        bf16 padded[2][LANES] = {{0}};
        memcpy(padded[0], first + i, (size_t)(n - i) * sizeof *first);
        memcpy(padded[1], up + i, (size_t)(n - i) * sizeof *up);
        store_bf16(padded[0], gated(g, load_bf16(padded[0]), load_bf16(padded[1])));
        memcpy(first + i, padded[0], (size_t)(n - i) * sizeof *first);
    }
}

#endif
