/*
 * kv_cache.c - how keys and values are stored: as they are, rounded to binary16, or as int8 with
 * a scale per vector, in the order in which the kernels' dot products of four bytes read them.
 */
#include "kernels/kernels.h"

#include <string.h>

uint64_t kv_bytes(hepta_cache_type type, uint32_t head_dim, uint64_t n) {
    switch (type) {
    case HEPTA_CACHE_F32:
        return n * head_dim * sizeof(float);
    case HEPTA_CACHE_F16:
        return n * head_dim * sizeof(uint16_t);
    default:
        return round_up(n, KV_TILE) * KV_ROW(head_dim);
    }
}

static void store_row(hepta_cache_type type, void *rows, uint32_t n, size_t position,
                      const float *x) {
    if (type == HEPTA_CACHE_F32) {
        memcpy((float *)rows + position * n, x, n * sizeof *x);
        return;
    }
    uint16_t *row = (uint16_t *)rows + position * n;
    for (uint32_t i = 0; i < n; i++) {
        row[i] = half_from_float(x[i]);
    }
}

void kv_store(const kernels *k, const kv_cache *cache, uint32_t head_dim, size_t position,
              const float *key, const float *value, int8_t *scratch) {
    if (cache->type != HEPTA_CACHE_Q8) {
        store_row(cache->type, cache->k, head_dim, position, key);
        store_row(cache->type, cache->v, head_dim, position, value);
        return;
    }
    const size_t row = KV_ROW(head_dim);
    int8_t *keys = (int8_t *)cache->k + kv_key_index(position, 0, row);
    int8_t *values = (int8_t *)cache->v + kv_value_index(position, 0, row);
    int32_t sum;
    memset(scratch, 0, row);
    k->quantize_activation(key, head_dim, scratch, &cache->k_scale[position], &sum);
    for (size_t d = 0; d < row; d += 4) {
        memcpy(keys + 16 * d, scratch + d, 4);
    }
    k->quantize_activation(value, head_dim, scratch, &cache->v_scale[position], &sum);
    for (size_t d = 0; d < row; d++) {
        values[4 * d] = scratch[d];
    }
}
