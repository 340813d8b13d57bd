/*
 * dequantize.c - the block types of GGUF files, and GPTQ and AWQ matrices, to F32.
 *
 * Each function turns one block into its 32 or 256 weights with the float operations of the
 * published definition, one by one: ggml's dequantize_row_* (github.com/ggml-org/ggml,
 * src/ggml-quants.c; layouts: src/ggml-common.h) and, equal to it, gguf.quants of the Python
 * package gguf. tests/compare_dequantize.py compares bit by bit with the latter.
 *
 * In the names below d is a binary16 scale, m a binary16 offset, q the stored integers.
 */
#include "format/private.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

static float half_at(const uint8_t *p) {
    return half_to_float(load_u16(p));
}

/* ---- Blocks of 32: one scale, perhaps an offset ------------------------ */

/* Byte j holds weight j in its low half and weight j + 16 in its high one. */
static void q4_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)((b[2 + j] & 15) - 8) * d;
        y[j + 16] = (float)((b[2 + j] >> 4) - 8) * d;
    }
}

static void q4_1(const uint8_t *b, float *y) {
    float d = half_at(b), m = half_at(b + 2);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)(b[4 + j] & 15) * d + m;
        y[j + 16] = (float)(b[4 + j] >> 4) * d + m;
    }
}

/* Bit j of `high` is bit 4 of weight j. */
static int five_bits(uint32_t high, int j, int low) {
    return low | (int)(high >> j & 1) << 4;
}

static void q5_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    uint32_t high = load_u32(b + 2);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)(five_bits(high, j, b[6 + j] & 15) - 16) * d;
        y[j + 16] = (float)(five_bits(high, j + 16, b[6 + j] >> 4) - 16) * d;
    }
}

static void q5_1(const uint8_t *b, float *y) {
    float d = half_at(b), m = half_at(b + 2);
    uint32_t high = load_u32(b + 4);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)five_bits(high, j, b[8 + j] & 15) * d + m;
        y[j + 16] = (float)five_bits(high, j + 16, b[8 + j] >> 4) * d + m;
    }
}

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};

static void iq4_32(float d, const uint8_t *q, float *y) {
    for (int j = 0; j < 16; j++) {
        y[j] = d * (float)iq4_values[q[j] & 15];
        y[j + 16] = d * (float)iq4_values[q[j] >> 4];
    }
}

static void iq4_nl(const uint8_t *b, float *y) {
    iq4_32(half_at(b), b + 2, y);
}

/* ---- Blocks of 256: 8 or 16 groups whose scales are integers times d --- */

/* scales 16 (scale, minimum: 4 bits each), q 64, d, dmin */
static void q2_k(const uint8_t *b, float *y) {
    float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int group = 0; group < 16; group++) { /* of 16 weights */
        float dl = d * (float)(b[group] & 15), ml = dmin * (float)(b[group] >> 4);
        const uint8_t *q = b + 16 + group / 8 * 32 + group % 2 * 16;
        int shift = group % 8 / 2 * 2;
        for (int j = 0; j < 16; j++) {
            y[16 * group + j] = dl * (float)(q[j] >> shift & 3) - ml;
        }
    }
}

/* high bits 32, q 64, scales 12 (16 of 6 bits), d */
static void q3_k(const uint8_t *b, float *y) {
    const uint8_t *scales = b + 96;
    float d = half_at(b + 108);
    for (int group = 0; group < 16; group++) { /* of 16 weights */
        int low = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
        int high = scales[8 + group % 4] >> group / 4 * 2 & 3;
        float dl = d * (float)((low | high << 4) - 32);
        const uint8_t *q = b + 32 + group / 8 * 32 + group % 2 * 16, *h = b + group % 2 * 16;
        int shift = group % 8 / 2 * 2;
        for (int j = 0; j < 16; j++) {
            int bit = h[j] >> group / 2 & 1;
            y[16 * group + j] = dl * (float)((q[j] >> shift & 3) - (bit != 0 ? 0 : 4));
        }
    }
}

/* Scale and minimum, of 6 bits, of group 0..7: in 12 bytes. */
static void scale_min(const uint8_t *s, int group, float *scale, float *min) {
    if (group < 4) {
        *scale = (float)(s[group] & 63);
        *min = (float)(s[group + 4] & 63);
    } else {
        *scale = (float)((s[group + 4] & 15) | s[group - 4] >> 6 << 4);
        *min = (float)(s[group + 4] >> 4 | s[group] >> 6 << 4);
    }
}

/* d, dmin, scales 12, q 128 */
static void q4_k(const uint8_t *b, float *y) {
    float d = half_at(b), dmin = half_at(b + 2);
    for (int group = 0; group < 8; group++) { /* of 32 weights */
        float scale, min;
        scale_min(b + 4, group, &scale, &min);
        float dl = d * scale, ml = dmin * min;
        const uint8_t *q = b + 16 + group / 2 * 32;
        int shift = group % 2 * 4;
        for (int j = 0; j < 32; j++) {
            y[32 * group + j] = dl * (float)(q[j] >> shift & 15) - ml;
        }
    }
}

/* d, dmin, scales 12, high bits 32, q 128 */
static void q5_k(const uint8_t *b, float *y) {
    float d = half_at(b), dmin = half_at(b + 2);
    for (int group = 0; group < 8; group++) { /* of 32 weights */
        float scale, min;
        scale_min(b + 4, group, &scale, &min);
        float dl = d * scale, ml = dmin * min;
        const uint8_t *h = b + 16, *q = b + 48 + group / 2 * 32;
        int shift = group % 2 * 4;
        for (int j = 0; j < 32; j++) {
            int value = (q[j] >> shift & 15) + (h[j] >> group & 1) * 16;
            y[32 * group + j] = dl * (float)value - ml;
        }
    }
}

/* low bits 128, high bits 64, scales 16 (int8), d */
static void q6_k(const uint8_t *b, float *y) {
    float d = half_at(b + 208);
    for (int group = 0; group < 16; group++) { /* of 16 weights */
        int half = group / 8, part = group % 8 / 2, first = group % 2 * 16;
        float dl = d * (float)(int8_t)b[192 + group];
        const uint8_t *low = b + half * 64 + part % 2 * 32 + first;
        const uint8_t *high = b + 128 + half * 32 + first;
        for (int j = 0; j < 16; j++) {
            int value = (low[j] >> part / 2 * 4 & 15) | (high[j] >> part * 2 & 3) << 4;
            y[16 * group + j] = dl * (float)(value - 32);
        }
    }
}

/* d, high bits of scales 2, low bits of scales 4, q 128 */
static void iq4_xs(const uint8_t *b, float *y) {
    float d = half_at(b);
    uint32_t high = load_u16(b + 2);
    for (int group = 0; group < 8; group++) {
        int low = b[4 + group / 2] >> group % 2 * 4 & 15;
        int scale = low | (int)(high >> 2 * group & 3) << 4;
        iq4_32(d * (float)(scale - 32), b + 8 + 16 * group, y + 32 * group);
    }
}

/* ---- GPTQ and AWQ ------------------------------------------------------ */

/* Integer i of `bits` bits in a string of bits in 32-bit words `stride` bytes apart. */
static uint32_t integer_at(const uint8_t *words, uint64_t stride, uint64_t i, uint32_t bits) {
    uint64_t at = i * bits, shift = at % 32;
    const uint8_t *word = words + at / 32 * stride;
    uint32_t value = load_u32(word) >> shift;
    if (shift + bits > 32) {
        value |= load_u32(word + stride) << (32 - shift);
    }
    return value & ((1u << bits) - 1);
}

/* Where AWQ puts row r: of eight that share a word, the even ones come first. */
static uint64_t awq_place(uint64_t r) {
    return r / 8 * 8 + (r % 8) / 2 + (r % 2) * 4;
}

static float scale_at(uint32_t type, const uint8_t *scales, uint64_t i) {
    float f;
    if (type == TENSOR_F32) {
        memcpy(&f, scales + 4 * i, sizeof f);
        return f;
    }
    uint16_t h = load_u16(scales + 2 * i);
    return type == TENSOR_F16 ? half_to_float(h) : bfloat_to_float(h);
}

void tensor_groups_to_f32(const tensor *t, uint64_t row, float *dst) {
    const tensor_groups *g = t->groups;
    const bool awq = t->type == TENSOR_AWQ;
    const uint64_t n_rows = t->ne[1], n_cols = t->ne[0];
    const uint64_t row_bytes = n_rows * g->bits / 8; /* of integers for all rows */
    const uint64_t place = awq ? awq_place(row) : row;
    uint64_t group = UINT64_MAX, end = 0; /* column where the next group begins, without index */
    float scale = 0;
    int32_t zero = 0;
    for (uint64_t i = 0; i < n_cols; i++) {
        uint64_t own = g->index != NULL ? load_u32(g->index + 4 * i) : i < end ? group : group + 1;
        if (own != group) {
            group = own;
            end = (group + 1) * g->size;
            scale = scale_at(g->scale_type, g->scales, group * n_rows + row);
            zero = (int32_t)(integer_at(g->zeros + group * row_bytes, 4, place, g->bits) +
                             g->zero_offset);
        }
        uint32_t q = awq ? integer_at(t->data + i * row_bytes, 4, place, g->bits)
                         : integer_at(t->data + 4 * row, 4 * n_rows, i, g->bits);
        dst[i] = scale * (float)((int32_t)q - zero);
    }
}

/* ---- All of them ------------------------------------------------------- */

typedef void (*block_fn)(const uint8_t *block, float *y);

static block_fn find_block(uint32_t type) {
    static const block_fn functions[] = {
        [TENSOR_Q4_0] = q4_0,     [TENSOR_Q4_1] = q4_1,     [TENSOR_Q5_0] = q5_0,
        [TENSOR_Q5_1] = q5_1,     [TENSOR_Q2_K] = q2_k,     [TENSOR_Q3_K] = q3_k,
        [TENSOR_Q4_K] = q4_k,     [TENSOR_Q5_K] = q5_k,     [TENSOR_Q6_K] = q6_k,
        [TENSOR_IQ4_NL] = iq4_nl, [TENSOR_IQ4_XS] = iq4_xs,
    };
    return type < sizeof functions / sizeof functions[0] ? functions[type] : NULL;
}

bool tensor_type_is_blocks(uint32_t type) {
    return find_block(type) != NULL;
}

bool tensor_type_is_readable(uint32_t type) {
    return type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_BF16 || type == TENSOR_Q8_0 ||
           type == TENSOR_GPTQ || type == TENSOR_AWQ || tensor_type_is_blocks(type);
}

void tensor_blocks_to_f32(uint32_t type, const uint8_t *src, uint64_t n, float *dst) {
    block_fn convert = find_block(type);
    uint64_t items = 1, bytes = 0;
    bool known = tensor_type_block(type, &items, &bytes);
    assert(known && convert != NULL && n % items == 0);
    (void)known;
    for (uint64_t i = 0; i < n; i += items, src += bytes) {
        convert(src, dst + i);
    }
}

static bool is_original(uint32_t type) {
    enum { F64 = 28 };
    return type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_BF16 || type == F64;
}

bool container_source_types(const container *c, char *out, size_t n) {
    bool quantized = false;
    size_t used = 0;
    out[0] = '\0';
    for (uint32_t type = 0; type <= TENSOR_LAST; type++) {
        size_t count = 0;
        for (size_t i = 0; i < c->n_tensors; i++) {
            count += c->tensors[i].type == type;
        }
        quantized |= count > 0 && !is_original(type);
        if (count > 0 && used < n) {
            used += (size_t)snprintf(out + used, n - used, "%s%zu x %s", used > 0 ? ", " : "",
                                     count, tensor_type_name(type));
        }
    }
    return quantized;
}
