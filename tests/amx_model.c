/*
 * amx_model.c - src/kernels/amx.c on tiles of plain arrays, for machines without AMX: the
 * operations as the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, defines
 * them. What would be a fault there is an abort here.
 */
#if defined(__x86_64__)

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AMX_KERNEL(name) name##_amx_model
#define tile_configure model_configure
#define tile_release model_release
#define tile_zero model_zero
#define tile_load(tile, p) model_load(tile, p, 64)
#define tile_store(tile, p) model_store(tile, p, 64)
#define tile_dot model_dot

static void model_configure(const void *config);
static void model_release(void);
static void model_zero(int tile);
static void model_load(int tile, const void *p, size_t stride);
static void model_store(int tile, void *p, size_t stride);
static void model_dot(int sums, int first, int second);

#include "kernels/amx.c"

/* Bytes past the configured rows and columns are zero. */
static _Thread_local struct {
    bool configured;
    struct {
        uint32_t rows, row_bytes;
        uint8_t data[16][64];
    } tiles[N_TILES];
} model;

static void must(bool holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "amx_model: %s\n", what);
        abort();
    }
}

static void model_configure(const void *config) {
    const tile_config *c = config;
    memset(&model, 0, sizeof model);
    must(sizeof *c == 64 && c->palette == 1 && c->start_row == 0, "palette 1 from row 0");
    for (int i = 0; i < 14; i++) {
        must(c->reserved[i] == 0, "reserved bytes are zero");
    }
    for (int i = 0; i < 16; i++) {
        must(c->rows[i] <= 16 && c->row_bytes[i] <= 64, "16 rows of 64 bytes at most");
        must((c->rows[i] == 0) == (c->row_bytes[i] == 0), "no rows, no bytes");
        must(i < N_TILES || c->rows[i] == 0, "eight tiles");
        if (i < N_TILES) {
            model.tiles[i].rows = c->rows[i];
            model.tiles[i].row_bytes = c->row_bytes[i];
        }
    }
    model.configured = true;
}

static void model_release(void) {
    memset(&model, 0, sizeof model);
}

static void must_be_tile(int tile) {
    must(model.configured, "tiles are configured");
    must(tile >= 0 && tile < N_TILES && model.tiles[tile].rows > 0, "the tile is configured");
}

static void model_zero(int tile) {
    must_be_tile(tile);
    memset(model.tiles[tile].data, 0, TILE_BYTES);
}

static void model_load(int tile, const void *p, size_t stride) {
    model_zero(tile);
    for (uint32_t r = 0; r < model.tiles[tile].rows; r++) {
        memcpy(model.tiles[tile].data[r], (const uint8_t *)p + r * stride,
               model.tiles[tile].row_bytes);
    }
}

static void model_store(int tile, void *p, size_t stride) {
    must_be_tile(tile);
    for (uint32_t r = 0; r < model.tiles[tile].rows; r++) {
        memcpy((uint8_t *)p + r * stride, model.tiles[tile].data[r], model.tiles[tile].row_bytes);
    }
}

/* TDPBSUD */
static void model_dot(int sums, int first, int second) {
    must_be_tile(sums);
    must_be_tile(first);
    must_be_tile(second);
    must(sums != first && sums != second && first != second, "three tiles");
    const uint32_t n_rows = model.tiles[sums].rows, n_cols = model.tiles[sums].row_bytes / 4;
    const uint32_t n_inner = model.tiles[first].row_bytes / 4;
    must(model.tiles[first].rows == n_rows && model.tiles[second].row_bytes == 4 * n_cols &&
             model.tiles[second].rows == n_inner && model.tiles[sums].row_bytes % 4 == 0 &&
             model.tiles[first].row_bytes % 4 == 0,
         "sizes match");
    for (uint32_t m = 0; m < n_rows; m++) {
        uint32_t row[16];
        memcpy(row, model.tiles[sums].data[m], sizeof row);
        for (uint32_t k = 0; k < n_inner; k++) {
            for (uint32_t n = 0; n < n_cols; n++) {
                for (uint32_t b = 0; b < 4; b++) {
                    const int32_t x = (int8_t)model.tiles[first].data[m][4 * k + b];
                    const int32_t y = model.tiles[second].data[k][4 * n + b];
                    row[n] += (uint32_t)(x * y); /* wraps */
                }
            }
        }
        memcpy(model.tiles[sums].data[m], row, sizeof row);
    }
}

#else

typedef int amx_model_needs_x86_64; /* ISO C forbids an empty file */

#endif
