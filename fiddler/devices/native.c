/* Few rows times many weights, in bfloat16 or packed, at the speed at which memory hands out the weights.

   torch runs one parallel region per matrix and ends it with a barrier: of a small expert that barrier is most of the
   time. Here a region holds a whole layer's experts, cut into chunks that threads take as they come free, so a core
   that other programs slow down holds up nobody. A core asks memory for more when it follows several streams, and a
   stream that ends with every row never gets going: four rows of weights are read side by side, each walking through
   its own part of the chunk.

   Compiled by native.py for the machine it runs on, with the headers beside it. */

#include "dots.h"
#include "gates.h"
#include "whole.h"

enum { CHUNKS = 8, LEAST_BYTES = 1 << 15, MOST_BYTES = 1 << 20 }; /* For each thread, and their bytes of weights. */

typedef struct {
    matrix gate, up, down; /* [inner, hidden] twice, [hidden, inner]; without a gate the first two are the same */
    gate_formula formula;
} expert;

typedef struct {
    const expert *e;
    const bf16 *x; /* [n_rows, hidden] without gaps */
    bf16 *y;       /* [n_rows, hidden] without gaps */
    integer n_rows;
} load;

/* Two rows of weights of each of two matrices, or four of one: a tile, and where its results go. */
typedef struct {
    const matrix *m;
    integer start, stop; /* rows */
    bf16 *y;             /* [n_rows, out] */
} stream;

/* Rows of weights to a chunk, of n matrices of so many rows that n_threads share. */
static integer chunk_rows(integer n, integer rows, integer bytes_a_row, integer n_threads) {
    integer chunk = n * rows * bytes_a_row / (CHUNKS * n_threads);
    chunk = chunk < LEAST_BYTES ? LEAST_BYTES : least(chunk, MOST_BYTES);
    return (chunk / bytes_a_row + W) / W * W;
}

static integer bytes_a_row(const matrix *m) {
    int none = m->kind == PLAIN || in_blocks(m->kind);
    return row_bytes(m) + (none ? 0 : scales_across(m) * scale_bytes(m) / m->block_rows);
}

/* y = x wT (+ bias) of W streams of rows, of which y has out columns; their matrices are of one kind and width. */
static void multiply(const stream streams[W], const bf16 *x, integer out, integer n_rows, integer steps, desk *d) {
    const matrix *m = streams[0].m;
    integer columns = m->columns;
    forget(d);
    for (integer panel = 0; panel < n_rows; panel += PANEL) {
        integer n = least(n_rows - panel, PANEL);
        const bf16 *xs = x + panel * columns;
        multiplier k = multiplier_of(m, n);
        arrange(m, &k.way, d, xs, columns, n);
        for (integer step = 0; step < steps; step++) {
            integer rows[W];
            const byte *codes[W];
            for (int i = 0; i < W; i++) {
                const stream *s = streams + i;
                rows[i] = least(s->start + step, s->stop - 1);
                codes[i] = codes_of(s->m, rows[i]);
                read(s->m, &k.way, d, i, rows[i]);
            }
            decode_ahead(&k, codes, d);
            for (integer j = 0; j < n; j += X) {
                float found[W][X];
                integer n_x = least(n - j, X);
                tile(&k, codes, d, xs, j, n_x, found);
                for (int i = 0; i < W; i++) {
                    float factor = factor_of(streams[i].m), bias = bias_of(streams[i].m, rows[i]);
                    bf16 *y = streams[i].y + (panel + j) * out + rows[i];
                    for (int r = 0; r < n_x; r++) y[r * out] = narrow(found[i][r] * factor + bias);
                }
            }
        }
    }
}

/* Rows start to stop of one matrix: each stream walks through its own quarter. */
static void multiply_one(const matrix *m, const bf16 *x, bf16 *y, integer out, integer n_rows, integer start,
                         integer stop, desk *d) {
    integer part = parts(stop - start, W);
    stream streams[W];
    for (int i = 0; i < W; i++) streams[i] = (stream){m, least(start + i * part, stop - 1), stop, y};
    multiply(streams, x, out, n_rows, part, d);
}

/* Rows start to stop of gate and up, two streams of each, and what lies between them and down. */
static void rise(const load *l, bf16 *middle, integer inner, integer start, integer stop, desk *d) {
    const expert *e = l->e;
    const gate_formula *g = &e->formula;
    bf16 *up = g->gated ? middle + l->n_rows * inner : middle;
    if (g->gated) {
        integer part = parts(stop - start, 2), half = least(start + part, stop - 1);
        stream streams[W] = {{&e->gate, start, stop, middle}, {&e->gate, half, stop, middle},
                             {&e->up, start, stop, up}, {&e->up, half, stop, up}};
        multiply(streams, l->x, inner, l->n_rows, part, d);
    } else {
        multiply_one(&e->up, l->x, up, inner, l->n_rows, start, stop, d);
    }
    for (integer j = 0; j < l->n_rows; j++)
        apply(g, middle + j * inner + start, up + j * inner + start, stop - start);
}

/* y [n_rows, out] = x [n_rows, columns] wT (+ bias [out]), of a matrix of bfloat16. */
void fiddler_matmul(const bf16 *w, integer stride, const bf16 *x, const bf16 *bias, bf16 *y, integer out,
                    integer columns, integer n_rows, int n_threads) {
    matrix m = {.codes = (const byte *)w, .stride = 2 * stride, .step = 1, .rows = out, .columns = columns,
                .kind = PLAIN, .factor = 1.0, .bias = bias, .bias_stride = 1};
    integer rows = chunk_rows(1, out, 2 * columns, n_threads);
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (integer start = 0; start < out; start += rows) {
        desk d; /* a matrix of bfloat16 puts nothing on it */
        multiply_one(&m, x, y, out, n_rows, start, least(start + rows, out), &d);
    }
}

/* The same of any matrix; -1 for one that is not held, or where a room for each thread is too small. */
int fiddler_product(const matrix *m, const bf16 *x, bf16 *y, integer n_rows, byte *room, integer room_bytes,
                    int n_threads) {
    integer mine = room_of(m->columns);
    if (!holds(m, m->rows, m->columns) || room_bytes < n_threads * mine) return -1;
    integer rows = chunk_rows(1, m->rows, bytes_a_row(m), n_threads);
#pragma omp parallel num_threads(n_threads)
    {
        desk d = desk_of(room + thread() * mine, m->columns);
#pragma omp for schedule(dynamic) nowait
        for (integer start = 0; start < m->rows; start += rows)
            multiply_one(m, x, y, m->rows, n_rows, start, least(start + rows, m->rows), &d);
    }
    return 0;
}

/* y [out, columns] is the matrix in bfloat16. Returns as fiddler_product does. */
int fiddler_decode(const matrix *m, bf16 *y, byte *room, integer room_bytes, int n_threads) {
    integer mine = room_of(m->columns);
    if (!holds(m, m->rows, m->columns) || room_bytes < n_threads * mine) return -1;
    integer rows = chunk_rows(1, m->rows, bytes_a_row(m), n_threads);
#pragma omp parallel num_threads(n_threads)
    {
        desk d = desk_of(room + thread() * mine, m->columns);
#pragma omp for schedule(dynamic) nowait
        for (integer start = 0; start < m->rows; start += rows)
            expand(m, y, start, least(start + rows, m->rows), &d);
    }
    return 0;
}

/* Which load is not of an expert of this shape, whose gate and up are of one kind; or n. */
static integer stranger(const load *loads, integer n, integer hidden, integer inner) {
    for (integer i = 0; i < n; i++) {
        const expert *e = loads[i].e;
        if (!holds(&e->up, inner, hidden) || !holds(&e->down, hidden, inner) || loads[i].n_rows < 1) return i;
        if (e->formula.gated && (!holds(&e->gate, inner, hidden) || !alike(&e->gate, &e->up))) return i;
    }
    return n;
}

/* A layer's experts. room is for what lies between up and down, and for the threads. Returns the number of the load that
   does not fit, n if all do, and -1 where the room is too small. */
integer fiddler_experts(const load *loads, integer n, integer hidden, integer inner, byte *room, integer room_bytes,
                        int n_threads) {
    integer odd = stranger(loads, n, hidden, inner), mine = room_of(hidden > inner ? hidden : inner);
    if (odd < n) return odd;
    bf16 *rooms[n], *middle = (bf16 *)(room + n_threads * mine);
    integer up_bytes = 0, down_bytes = 0;
    for (integer i = 0; i < n; i++) {
        rooms[i] = middle;
        middle += 2 * loads[i].n_rows * inner;
        up_bytes += bytes_a_row(&loads[i].e->up) * (loads[i].e->formula.gated ? 2 : 1);
        down_bytes += bytes_a_row(&loads[i].e->down);
    }
    if ((byte *)middle > room + room_bytes) return -1;
    integer up_rows = chunk_rows(n, inner, parts(up_bytes, n), n_threads), up_chunks = parts(inner, up_rows);
    integer down_rows = chunk_rows(n, hidden, parts(down_bytes, n), n_threads), down_chunks = parts(hidden, down_rows);
#pragma omp parallel num_threads(n_threads)
    {
        desk d = desk_of(room + thread() * mine, hidden > inner ? hidden : inner);
#pragma omp for schedule(dynamic)
        for (integer chunk = 0; chunk < n * up_chunks; chunk++) {
            integer i = chunk / up_chunks, start = chunk % up_chunks * up_rows;
            rise(loads + i, rooms[i], inner, start, least(start + up_rows, inner), &d);
        }
#pragma omp for schedule(dynamic) nowait
        for (integer chunk = 0; chunk < n * down_chunks; chunk++) {
            const load *l = loads + chunk / down_chunks;
            integer start = chunk % down_chunks * down_rows;
            multiply_one(&l->e->down, rooms[chunk / down_chunks], l->y, hidden, l->n_rows, start,
                         least(start + down_rows, hidden), &d);
        }
    }
    return n;
}
