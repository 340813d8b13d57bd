/*
 * resume.c - whether an interrupted run and this one make the same file.
 */
#include "quantize/quantizer.h"

#include "base/base.h"

/* To be raised whenever the quantizer makes other bytes of the same input and options. */
enum { REVISION = 2 };

static void hash_number(sha256 *hash, uint64_t x) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(x >> (8 * i));
    }
    sha256_update(hash, bytes, sizeof bytes);
}

/* PIECES of the weights of each tensor, spread evenly: other weights differ nearly everywhere. */
static void hash_weights(sha256 *hash, const container *in) {
    enum { PIECES = 64, PIECE = 64 };
    for (size_t i = 0; i < in->n_tensors; i++) {
        const tensor *t = &in->tensors[i];
        hash_number(hash, t->type);
        hash_number(hash, t->n_bytes);
        for (uint64_t k = 0; k < PIECES && t->data != NULL; k++) {
            const uint64_t at = (t->n_bytes > PIECE ? t->n_bytes - PIECE : 0) / (PIECES - 1) * k;
            sha256_update(hash, t->data + at, t->n_bytes < PIECE ? (size_t)t->n_bytes : PIECE);
        }
    }
}

hepta_status resume_identity(const container *in, const hepta_quantize_options *options,
                             uint8_t digest[32], hepta_error *err) {
    sha256 hash;
    sha256_start(&hash);
    hash_number(&hash, REVISION);
    hash_number(&hash, (uint64_t)options->effort << 32 | options->without);
    hash_weights(&hash, in);
    if (options->calibration_path != NULL) {
        file_map map;
        hepta_status status = file_map_open(options->calibration_path, &map, err);
        if (status != HEPTA_OK) {
            return status;
        }
        sha256_update(&hash, map.data, map.size);
        file_map_close(&map);
    }
    sha256_finish(&hash, digest);
    return HEPTA_OK;
}
