/*
 * types.c - what GGUF's numbers for value and tensor types mean: names and sizes.
 *
 * Tensor types follow GGML (ggml.h, ggml-common.h): a type packs rows in blocks of so many items
 * in so many bytes, and a row is a whole number of blocks. Types that no file may hold any more
 * (4, 5, 31-33, 36-38) are absent. Most are known here only so that files can be listed and
 * their layout checked.
 */
#include "format/private.h"

typedef struct type_info {
    const char *name; /* NULL: no such type */
    uint16_t items, bytes;
} type_info;

static const type_info types[] = {
    [0] = {"F32", 1, 4},         [1] = {"F16", 1, 2},         [2] = {"Q4_0", 32, 18},
    [3] = {"Q4_1", 32, 20},      [6] = {"Q5_0", 32, 22},      [7] = {"Q5_1", 32, 24},
    [8] = {"Q8_0", 32, 34},      [9] = {"Q8_1", 32, 36},      [10] = {"Q2_K", 256, 84},
    [11] = {"Q3_K", 256, 110},   [12] = {"Q4_K", 256, 144},   [13] = {"Q5_K", 256, 176},
    [14] = {"Q6_K", 256, 210},   [15] = {"Q8_K", 256, 292},   [16] = {"IQ2_XXS", 256, 66},
    [17] = {"IQ2_XS", 256, 74},  [18] = {"IQ3_XXS", 256, 98}, [19] = {"IQ1_S", 256, 50},
    [20] = {"IQ4_NL", 32, 18},   [21] = {"IQ3_S", 256, 110},  [22] = {"IQ2_S", 256, 82},
    [23] = {"IQ4_XS", 256, 136}, [24] = {"I8", 1, 1},         [25] = {"I16", 1, 2},
    [26] = {"I32", 1, 4},        [27] = {"I64", 1, 8},        [28] = {"F64", 1, 8},
    [29] = {"IQ1_M", 256, 56},   [30] = {"BF16", 1, 2},       [34] = {"TQ1_0", 256, 54},
    [35] = {"TQ2_0", 256, 66},   [39] = {"MXFP4", 32, 17},    [40] = {"NVFP4", 64, 36},
    [41] = {"Q1_0", 128, 18},
};

static const type_info *find_type(uint32_t type) {
    bool known = type < sizeof types / sizeof types[0] && types[type].name != NULL;
    return known ? &types[type] : NULL;
}

const char *tensor_type_name(uint32_t type) {
    const type_info *info = find_type(type);
    return info != NULL            ? info->name
           : type == TENSOR_PACKED ? "packed"
           : type == TENSOR_GPTQ   ? "GPTQ"
           : type == TENSOR_AWQ    ? "AWQ"
                                   : "unknown";
}

bool tensor_type_block(uint32_t type, uint64_t *items, uint64_t *bytes) {
    const type_info *info = find_type(type);
    if (info == NULL) {
        return false;
    }
    *items = info->items;
    *bytes = info->bytes;
    return true;
}

bool tensor_type_bytes(uint32_t type, const uint64_t ne[4], uint64_t *n_bytes) {
    uint64_t items, bytes, total;
    if (!tensor_type_block(type, &items, &bytes) || ne[0] == 0 || ne[0] % items != 0 ||
        mul_overflows(ne[0] / items, bytes, &total)) {
        return false;
    }
    for (int i = 1; i < 4; i++) {
        if (ne[i] == 0 || mul_overflows(total, ne[i], &total)) {
            return false;
        }
    }
    *n_bytes = total;
    return true;
}

bool tensor_packed_bytes(uint32_t half_bits, uint64_t n_rows, uint64_t n_cols, uint64_t *n_bytes) {
    bool known = (half_bits >= 4 && half_bits <= 8) || half_bits == 16;
    if (!known || n_rows == 0 || n_rows > UINT32_MAX - (PACKED_STRIP - 1) || n_cols == 0 ||
        n_cols > TENSOR_PACKED_MAX_COLS) {
        return false;
    }
    /* A block of 16 weights takes half_bits bytes. The product is below 2^32 * 2^14 * 2^4. */
    *n_bytes = round_up(n_rows, PACKED_STRIP) * (round_up(n_cols, 16) / 16 * half_bits + 2);
    return true;
}

void packed_put_row(uint32_t half_bits, uint64_t n_blocks, uint64_t row, const uint8_t *code,
                    uint8_t *matrix) {
    for (uint64_t b = 0; b < n_blocks; b++) {
        const packed_place place = packed_block(half_bits, n_blocks, row, b);
        for (uint32_t i = 0; i < half_bits; i++) {
            matrix[place.first + i * place.step] = *code++;
        }
    }
}

uint64_t tensor_n_weights(const tensor *t) {
    return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
}

uint64_t tensor_stored_bytes(const tensor *t) {
    return t->n_bytes + (t->groups != NULL ? t->groups->n_bytes : 0);
}

/* ---- Value types ------------------------------------------------------- */

static const struct {
    const char *name;
    uint8_t bytes;
} kv_types[] = {
    [KV_U8] = {"u8", 1},       [KV_I8] = {"i8", 1},     [KV_U16] = {"u16", 2},
    [KV_I16] = {"i16", 2},     [KV_U32] = {"u32", 4},   [KV_I32] = {"i32", 4},
    [KV_F32] = {"f32", 4},     [KV_BOOL] = {"bool", 1}, [KV_STRING] = {"string", 0},
    [KV_ARRAY] = {"array", 0}, [KV_U64] = {"u64", 8},   [KV_I64] = {"i64", 8},
    [KV_F64] = {"f64", 8},
};

const char *kv_type_name(kv_type type) {
    return (uint32_t)type <= KV_F64 ? kv_types[type].name : "unknown";
}

uint64_t kv_type_size(kv_type type) {
    return (uint32_t)type <= KV_F64 ? kv_types[type].bytes : 0;
}
