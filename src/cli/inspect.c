/*
 * inspect.c - hepta inspect: metadata and tensors of any supported model file.
 */
#include "cli/cli.h"

#include "format/container.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ITEMS_SHOWN = 6, STRING_SHOWN = 160 };

static const char *kind_name(container_kind kind) {
    static const char *const names[] = {
        [CONTAINER_GGUF] = "GGUF",
        [CONTAINER_HEPTA] = ".hepta (GGUF container)",
        [CONTAINER_HF] = "Hugging Face directory",
        [CONTAINER_LLAMA2C] = "llama2.c checkpoint",
    };
    return names[kind];
}

/* A name from a file, in at least `width` columns; it must not steer the terminal. */
static void print_name(const char *name, size_t n, size_t width) {
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)name[i];
        putchar(c < 0x20 || c == 0x7f ? '?' : c);
    }
    for (size_t i = n; i < width; i++) {
        putchar(' ');
    }
    putchar(' ');
}

/* ---- Values as JSON: the text form prints these ------------------------ */

static json_t *string_json(kv_string s) {
    return json_text(s.data, (size_t)s.n);
}

/* JSON has no NaN and no infinity, and jansson no integers above 2^63: strings stand for them. */
static json_t *real_json(double x) {
    return isfinite(x) ? json_real(x) : json_string(isnan(x) ? "nan" : x > 0 ? "inf" : "-inf");
}

static json_t *unsigned_json(uint64_t u) {
    return u <= INT64_MAX ? json_integer((json_int_t)u) : json_sprintf("%" PRIu64, u);
}

static json_t *item_json(const kv *a, uint64_t i) {
    switch (a->item_type) {
    case KV_STRING:
        return string_json(kv_item_string(a, i));
    case KV_F32:
    case KV_F64:
        return real_json(kv_item_f64(a, i));
    case KV_BOOL:
        return json_boolean(kv_item_i64(a, i) != 0);
    case KV_U64:
        return unsigned_json((uint64_t)kv_item_i64(a, i));
    default:
        return json_integer(kv_item_i64(a, i));
    }
}

/* Arrays longer than `limit` show their beginning only. */
static json_t *value_json(const kv *v, uint64_t limit) {
    switch (v->type) {
    case KV_STRING:
        return string_json(v->v.s);
    case KV_BOOL:
        return json_boolean(v->v.u != 0);
    case KV_F32:
    case KV_F64:
        return real_json(v->v.f);
    case KV_I8:
    case KV_I16:
    case KV_I32:
    case KV_I64:
        return json_integer(v->v.i);
    case KV_ARRAY: {
        json_t *array = json_array();
        for (uint64_t i = 0; i < v->n_items && i < limit; i++) {
            json_array_append_new(array, item_json(v, i));
        }
        return array;
    }
    default:
        return unsigned_json(v->v.u);
    }
}

static void print_value(const kv *v) {
    json_t *json = value_json(v, ITEMS_SHOWN);
    char *text = json_dumps(json, JSON_ENCODE_ANY | JSON_REAL_PRECISION(9));
    size_t n = text != NULL ? strlen(text) : 0;
    bool more = v->type == KV_ARRAY && v->n_items > ITEMS_SHOWN;
    if (n > STRING_SHOWN) {
        size_t end = STRING_SHOWN; /* do not cut a code point */
        while (end > 0 && ((unsigned char)text[end] & 0xc0) == 0x80) {
            end--;
        }
        printf("%.*s ...", (int)end, text);
    } else if (text != NULL) {
        printf("%s", text);
    }
    if (v->type == KV_ARRAY) {
        printf("%s (%" PRIu64 " items)", more ? " ..." : "", v->n_items);
    }
    free(text);
    json_decref(json);
}

/* ---- Tensors ----------------------------------------------------------- */

static double bits_per_weight(uint64_t bytes, uint64_t weights) {
    return weights > 0 ? (double)bytes * 8 / (double)weights : 0;
}

static void type_text(const tensor *t, char *out, size_t n) {
    if (t->type == TENSOR_PACKED) {
        snprintf(out, n, "%s %g", t->half_bits == 16 ? "int8" : "code", t->half_bits / 2.0);
    } else if (t->groups != NULL) {
        snprintf(out, n, "%s %u g%u", tensor_type_name(t->type), t->groups->bits, t->groups->size);
    } else {
        snprintf(out, n, "%s", tensor_type_name(t->type));
    }
}

static void shape_text(const tensor *t, char *out, size_t n) {
    size_t used = 0;
    out[0] = '\0';
    for (uint32_t d = t->n_dims; d-- > 0 && used < n;) { /* rows first */
        used +=
            (size_t)snprintf(out + used, n - used, "%" PRIu64 "%s", t->ne[d], d > 0 ? " x " : "");
    }
}

static json_t *tensor_json(const tensor *t) {
    char type[32], hex[65] = "";
    type_text(t, type, sizeof type);
    json_t *shape = json_array();
    for (uint32_t d = t->n_dims; d-- > 0;) {
        json_array_append_new(shape, json_integer((json_int_t)t->ne[d]));
    }
    json_t *json = json_pack("{s:o, s:s, s:o, s:I, s:I, s:f}", "name", json_name(t->name), "type",
                             type, "shape", shape, "offset", (json_int_t)t->offset, "bytes",
                             (json_int_t)tensor_stored_bytes(t), "bits_per_weight",
                             bits_per_weight(tensor_stored_bytes(t), tensor_n_weights(t)));
    if (json != NULL && t->has_sha256) {
        sha256_hex(t->sha256, hex);
        json_object_set_new(json, "sha256", json_string(hex));
    }
    return json;
}

static int print_as_json(const container *c, uint64_t weights, uint64_t bytes) {
    json_t *metadata = json_object(), *tensors = json_array();
    for (size_t i = 0; i < c->n_kvs; i++) {
        json_t *key = string_json(c->kvs[i].key);
        json_object_setn_new(metadata, json_string_value(key), json_string_length(key),
                             value_json(&c->kvs[i], UINT64_MAX));
        json_decref(key);
    }
    for (size_t i = 0; i < c->n_tensors; i++) {
        json_array_append_new(tensors, tensor_json(&c->tensors[i]));
    }
    return print_json(json_pack("{s:o, s:s, s:I, s:I, s:f, s:o, s:o}", "path", json_name(c->path),
                                "format", kind_name(c->kind), "weights", (json_int_t)weights,
                                "bytes", (json_int_t)bytes, "bits_per_weight",
                                bits_per_weight(bytes, weights), "metadata", metadata, "tensors",
                                tensors));
}

static int print_as_text(const container *c, uint64_t weights, uint64_t bytes, bool checksums) {
    printf("%s: %s, version %u\n\n", c->path, kind_name(c->kind), c->version);
    for (size_t i = 0; i < c->n_kvs; i++) {
        print_name(c->kvs[i].key.data, (size_t)c->kvs[i].key.n, 42);
        print_value(&c->kvs[i]);
        putchar('\n');
    }
    printf("\n%-32s %-10s %-20s %12s %8s\n", "tensor", "type", "shape", "bytes", "bits/w");
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        char type[32], shape[96], hex[65] = "";
        type_text(t, type, sizeof type);
        shape_text(t, shape, sizeof shape);
        print_name(t->name, strlen(t->name), 32);
        printf("%-10s %-20s %12" PRIu64 " %8.3f", type, shape, tensor_stored_bytes(t),
               bits_per_weight(tensor_stored_bytes(t), tensor_n_weights(t)));
        if (checksums && t->has_sha256) {
            sha256_hex(t->sha256, hex);
            printf("  %s", hex);
        }
        putchar('\n');
    }
    printf("\n%zu tensors, %" PRIu64 " weights, %" PRIu64 " bytes, %.3f bits per weight\n",
           c->n_tensors, weights, bytes, bits_per_weight(bytes, weights));
    return EXIT_OK;
}

int cli_inspect(int argc, char **argv) {
    const char *path = NULL;
    bool json = false, checksums = false;
    const option_spec specs[] = {
        {"json", 0, OPTION_FLAG, &json, NULL, "everything as JSON"},
        {"checksums", 0, OPTION_FLAG, &checksums, NULL, "also show each tensor's SHA-256"},
        {0},
    };
    const command_spec spec = {
        .usage = "inspect FILE [options]",
        .summary = "Shows a model's metadata and its tensors: types, shapes, bits per weight.",
        .details = "FILE is a .hepta or GGUF file, a Hugging Face directory or a llama2.c .bin.",
        .example = "hepta inspect model.hepta",
        .options = specs,
        .min_arguments = 1,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &path);
    if (code >= 0) {
        return code;
    }
    hepta_error err;
    container *c = NULL;
    container_options options = {.metadata_only = true};
    if (container_open(path, &options, &c, &err) != HEPTA_OK) {
        return report(&err);
    }
    uint64_t weights = 0, bytes = 0;
    for (size_t i = 0; i < c->n_tensors; i++) {
        weights += tensor_n_weights(&c->tensors[i]);
        bytes += tensor_stored_bytes(&c->tensors[i]);
    }
    code = json ? print_as_json(c, weights, bytes) : print_as_text(c, weights, bytes, checksums);
    container_close(c);
    return code;
}
