/*
 * verify.c - checking a whole file: what opening leaves unread.
 *
 * Opening has checked the structure and, in .hepta files, the header's hash. Here every byte of
 * data is read once: checksums, padding, and values that no healthy model holds: NaN and infinity
 * in float tensors and scales, anything but zero in the padding rows of packed matrices.
 *
 * Layout of packed matrices: docs/FORMAT.md.
 */
#include "format/private.h"

#include <math.h>
#include <string.h>

enum { STEP = 1 << 24 }; /* bytes between two calls of progress */

typedef struct verifier {
    hepta_progress_fn progress;
    void *context;
    uint64_t done, total;
    hepta_error *err;
} verifier;

static hepta_status report(verifier *v, const tensor *t) {
    if (v->progress != NULL && !v->progress(v->context, t->name, v->done, v->total)) {
        return error_set(v->err, HEPTA_ERROR_INTERRUPTED, "interrupted at tensor %.80s", t->name);
    }
    return HEPTA_OK;
}

/* ---- Checksum ---------------------------------------------------------- */

static hepta_status check_sha256(verifier *v, const tensor *t) {
    sha256 s;
    uint8_t digest[32];
    hepta_status status = HEPTA_OK;
    sha256_start(&s);
    for (uint64_t i = 0; status == HEPTA_OK && i < t->n_bytes; i += STEP) {
        uint64_t n = t->n_bytes - i < STEP ? t->n_bytes - i : STEP;
        sha256_update(&s, t->data + i, (size_t)n);
        v->done += n;
        status = report(v, t);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    sha256_finish(&s, digest);
    if (memcmp(digest, t->sha256, sizeof digest) != 0) {
        char hex[2][FORMAT_SHA256_HEX + 1];
        sha256_hex(digest, hex[0]);
        sha256_hex(t->sha256, hex[1]);
        return error_set(v->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s (%" PRIu64 " bytes from byte %" PRIu64
                         " on) has SHA-256 %.12s..., it should be %.12s...: its data are damaged; "
                         "get the file again",
                         path_shown(t->file), t->name, t->n_bytes, t->offset, hex[0], hex[1]);
    }
    return HEPTA_OK;
}

/* ---- Values ------------------------------------------------------------ */

static hepta_status not_finite(verifier *v, const tensor *t, const char *what, uint64_t i,
                               uint64_t at) {
    return error_set(v->err, HEPTA_ERROR_FORMAT,
                     "%s: tensor %.80s: %s %" PRIu64 ", at byte %" PRIu64
                     ", is NaN or infinite: the model is broken",
                     path_shown(t->file), t->name, what, i, t->offset + at);
}

/* A binary float is finite when its exponent bits are not all ones. */
static bool finite16(const uint8_t *p, uint32_t exponent) {
    return (load_u16(p) & exponent) != exponent;
}

/*
 * Checks `n` floats `stride` bytes apart from p on; returns the number of the first that is not
 * finite, or n.
 */
static uint64_t first_not_finite(uint32_t type, const uint8_t *p, uint64_t n, uint64_t stride) {
    const uint64_t f64_exponent = (uint64_t)0x7ff << 52;
    for (uint64_t i = 0; i < n; i++, p += stride) {
        bool finite = true;
        switch (type) {
        case TENSOR_F32:
            finite = (load_u32(p) & 0x7f800000) != 0x7f800000;
            break;
        case TENSOR_F16:
            finite = finite16(p, 0x7c00);
            break;
        case TENSOR_BF16:
            finite = finite16(p, 0x7f80);
            break;
        default: /* F64 */
            finite = (load_u64(p) & f64_exponent) != f64_exponent;
            break;
        }
        if (!finite) {
            return i;
        }
    }
    return n;
}

static hepta_status check_floats(verifier *v, const tensor *t) {
    uint64_t items, size, n = tensor_n_weights(t);
    if (!tensor_type_block(t->type, &items, &size)) {
        return HEPTA_OK;
    }
    uint64_t i = first_not_finite(t->type, t->data, n, size);
    return i == n ? HEPTA_OK : not_finite(v, t, "weight", i, i * size);
}

static hepta_status check_q8_0(verifier *v, const tensor *t) {
    uint64_t block = 34, n = t->n_bytes / block;
    uint64_t i = first_not_finite(TENSOR_F16, t->data, n, block);
    return i == n ? HEPTA_OK : not_finite(v, t, "the scale of block", i, i * block);
}

/* Scales of these types may be anywhere in a block, and products of them overflow nowhere. */
static hepta_status check_blocks(verifier *v, const tensor *t) {
    enum { MAX_BLOCK = 256 };
    float y[MAX_BLOCK];
    uint64_t items = MAX_BLOCK, bytes = 1;
    if (!tensor_type_block(t->type, &items, &bytes) || items > MAX_BLOCK) {
        return HEPTA_OK;
    }
    for (uint64_t i = 0; i < t->n_bytes / bytes; i++) {
        tensor_blocks_to_f32(t->type, t->data + i * bytes, items, y);
        for (uint64_t j = 0; j < items; j++) {
            if (!isfinite(y[j])) {
                return not_finite(v, t, "a scale of block", i, i * bytes);
            }
        }
    }
    return HEPTA_OK;
}

static hepta_status check_packed(verifier *v, const tensor *t) {
    uint64_t n_rows = round_up(t->ne[1], PACKED_STRIP), blocks = round_up(t->ne[0], 16) / 16;
    uint64_t scales = n_rows * blocks * t->half_bits;
    uint64_t r = first_not_finite(TENSOR_BF16, t->data + scales, n_rows, 2);
    if (r < n_rows) {
        return not_finite(v, t, "the scale of row", r, scales + 2 * r);
    }
    for (r = t->ne[1]; r < n_rows; r++) {
        uint64_t bad = load_u16(t->data + scales + 2 * r) != 0 ? scales + 2 * r : UINT64_MAX;
        for (uint64_t b = 0; b < blocks && bad == UINT64_MAX; b++) {
            packed_place place = packed_block(t->half_bits, blocks, r, b);
            for (uint64_t i = 0; i < t->half_bits && bad == UINT64_MAX; i++) {
                uint64_t at = place.first + i * place.step;
                bad = t->data[at] != 0 ? at : UINT64_MAX;
            }
        }
        if (bad != UINT64_MAX) {
            return error_set(v->err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %.80s: byte %" PRIu64 " belongs to padding row %" PRIu64
                             " and is %u; expected 0",
                             path_shown(t->file), t->name, t->offset + bad, r,
                             (unsigned)t->data[bad]);
        }
    }
    return HEPTA_OK;
}

static hepta_status check_groups(verifier *v, const tensor *t) {
    const tensor_groups *g = t->groups;
    uint64_t n = g->n_groups * t->ne[1];
    uint64_t i = first_not_finite(g->scale_type, g->scales, n, g->scale_type == TENSOR_F32 ? 4 : 2);
    if (i == n) {
        return HEPTA_OK;
    }
    return error_set(v->err, HEPTA_ERROR_FORMAT,
                     "%s: tensor %.80s: the scale of row %" PRIu64 ", group %" PRIu64
                     ", is NaN or infinite: the model is broken",
                     path_shown(t->file), t->name, i % t->ne[1], i / t->ne[1]);
}

static hepta_status check_values(verifier *v, const tensor *t) {
    switch (t->type) {
    case TENSOR_F32:
    case TENSOR_F16:
    case TENSOR_BF16:
    case 28: /* F64 */
        return check_floats(v, t);
    case TENSOR_Q8_0:
        return check_q8_0(v, t);
    case TENSOR_PACKED:
        return check_packed(v, t);
    case TENSOR_GPTQ:
    case TENSOR_AWQ:
        return check_groups(v, t);
    default: /* integers and types that are listed only: nothing to say about */
        return tensor_type_is_blocks(t->type) ? check_blocks(v, t) : HEPTA_OK;
    }
}

/* ---- Padding of .hepta files ------------------------------------------- */

static hepta_status check_padding(verifier *v, const tensor *t) {
    uint64_t end = t->offset + t->n_bytes, n = round_up(end, HEPTA_ALIGNMENT) - end;
    for (uint64_t i = 0; i < n; i++) {
        uint8_t byte = t->data[t->n_bytes + i];
        if (byte != 0) {
            return error_set(v->err, HEPTA_ERROR_FORMAT,
                             "%s: the padding after tensor %.80s is not zero: byte %" PRIu64
                             " is %u; get the file again",
                             path_shown(t->file), t->name, end + i, (unsigned)byte);
        }
    }
    return HEPTA_OK;
}

hepta_status container_verify(const container *c, hepta_progress_fn progress, void *context,
                              hepta_error *err) {
    verifier v = {.progress = progress, .context = context, .err = err};
    for (size_t i = 0; i < c->n_tensors; i++) {
        v.total += c->tensors[i].n_bytes;
    }
    hepta_status status = HEPTA_OK;
    for (size_t i = 0; status == HEPTA_OK && i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        if (t->has_sha256) {
            status = check_sha256(&v, t);
        } else {
            v.done += t->n_bytes;
            status = report(&v, t);
        }
        if (status == HEPTA_OK) {
            status = check_values(&v, t);
        }
        if (status == HEPTA_OK && c->kind == CONTAINER_HEPTA) {
            status = check_padding(&v, t);
        }
    }
    return status;
}
