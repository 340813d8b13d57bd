/*
 * test_text_util.c - helpers of the tokenizer tests, see text_util.h.
 */
#include "text_util.h"

#include "format/container.h"
#include "test.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

#include <stdlib.h>

buffer read_whole(const char *path) {
    FILE *f = fopen(path, "rb");
    buffer b = {NULL, 0};
    CHECK(f != NULL);
    fseek(f, 0, SEEK_END);
    b.n = (size_t)ftell(f);
    rewind(f);
    b.data = malloc(b.n + 1);
    CHECK(b.data != NULL && fread(b.data, 1, b.n, f) == b.n);
    b.data[b.n] = '\0';
    fclose(f);
    return b;
}

void write_whole(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL);
    CHECK(n == 0 || fwrite(data, 1, n, f) == n);
    CHECK(fclose(f) == 0);
}

void buffer_free(buffer *b) {
    free(b->data);
    *b = (buffer){NULL, 0};
}

ids parse_ids(const char **text) {
    ids list = {NULL, 0};
    bool lines = strchr(*text, ']') == NULL; /* a line each, or one JSON list */
    const char *s = *text;
    for (;;) {
        s += strspn(s, lines ? " " : " \n\t,");
        char *end;
        long id = strtol(s, &end, 10);
        if (end == s || (lines && *s == '\n')) {
            break;
        }
        list.items = realloc(list.items, (list.n + 1) * sizeof *list.items);
        list.items[list.n++] = (int32_t)id;
        s = end;
    }
    *text = s + (*s == '\n' ? 1 : 0);
    return list;
}

void ids_free(ids *list) {
    free(list->items);
    *list = (ids){NULL, 0};
}

void check_same_ids(const ids *found, const ids *expected, const char *text, size_t n) {
    for (size_t i = 0; i < found->n || i < expected->n; i++) {
        int32_t a = i < found->n ? found->items[i] : -1;
        int32_t b = i < expected->n ? expected->items[i] : -1;
        if (a != b) {
            test_fail(__FILE__, __LINE__, "token %zu of \"%.*s\": %d, expected %d", i,
                      (int)(n < 60 ? n : 60), text, (int)a, (int)b);
        }
    }
}

hepta_tokenizer *open_tokenizer(const char *relative) {
    hepta_tokenizer *t = NULL;
    hepta_error err = {0};
    CHECK_OK(hepta_tokenizer_open(NULL, test_need_data(relative), &t, &err));
    return t;
}

ids encode(const hepta_tokenizer *t, const void *text, size_t n, unsigned flags) {
    ids list = {NULL, 0};
    hepta_error err = {0};
    size_t capacity = n + 2, found = 0; /* a byte is at most one token, one space and BOS */
    list.items = malloc((capacity + 1) * sizeof *list.items);
    CHECK_OK(hepta_tokenizer_encode(t, text, n, flags, list.items, capacity, &found, &err));
    CHECK(found <= capacity);
    list.n = found;
    for (size_t i = 0; i < found; i++) {
        CHECK(list.items[i] >= 0 && (uint32_t)list.items[i] < hepta_tokenizer_size(t));
    }
    return list;
}

buffer decode(const hepta_tokenizer *t, const ids *list) {
    buffer b = {NULL, 0};
    bool first = true;
    for (size_t i = 0; i < list->n; i++) {
        size_t n = hepta_tokenizer_decode(t, list->items[i], first, false, NULL, 0);
        b.data = realloc(b.data, b.n + n + 1);
        size_t m = hepta_tokenizer_decode(t, list->items[i], first, false, (char *)b.data + b.n, n);
        CHECK_EQ_INT(m, n);
        b.n += n;
        first = first && list->items[i] == hepta_tokenizer_bos(t);
    }
    return b;
}

void random_bytes(uint8_t *out, size_t n, int kind) {
    static const uint32_t starts[] = {0x20,   0x20,   0x41,  0x61,   0xC0,   0x391,  0x430,
                                      0x5D0,  0x915,  0xE01, 0x3041, 0x4E00, 0xAC00, 0x1F600,
                                      0x2190, 0xFF01, 0x660, 0x2028, 0x10400};
    static const char plain[] = "   \n\n\r\tabcdefgEFGH0123'.,!";
    for (size_t i = 0; i < n;) {
        uint8_t bytes[4];
        size_t k = 1;
        if (kind == 0) {
            bytes[0] = (uint8_t)test_random_below(256);
        } else if (kind == 1) {
            uint32_t c = starts[test_random_below(sizeof starts / sizeof *starts)];
            k = utf8_encode(c + test_random_below(20), bytes);
        } else {
            bytes[0] = (uint8_t)plain[test_random_below(sizeof plain - 1)];
        }
        k = k < n - i ? k : n - i; /* may end in half a code point */
        memcpy(out + i, bytes, k);
        i += k;
    }
}

/* ---- Tiny vocabularies ------------------------------------------------- */

void tiny_add(tiny_vocabulary *v, const char *piece, int type, float score) {
    CHECK(v->n < TINY_MAX);
    v->pieces[v->n] = strdup(piece);
    v->types[v->n] = type;
    v->scores[v->n++] = score;
}

void tiny_free(tiny_vocabulary *v) {
    for (int i = 0; i < v->n; i++) {
        free(v->pieces[i]);
    }
    v->n = 0;
}

hepta_tokenizer *tiny_open(const tiny_vocabulary *v) {
    hepta_error err = {0};
    kv_string strings[TINY_MAX];
    for (int i = 0; i < v->n; i++) {
        strings[i] = (kv_string){v->pieces[i], strlen(v->pieces[i])};
    }
    container *c = memory_alloc(1, sizeof *c);
    uint64_t n = (uint64_t)v->n;
    CHECK(c != NULL);
    c->path = "tiny";
    CHECK_OK(container_set_string(c, "tokenizer.ggml.model", "llama", 5, &err));
    CHECK_OK(container_set_array(c, "tokenizer.ggml.tokens", KV_STRING, strings, n, &err));
    CHECK_OK(container_set_array(c, "tokenizer.ggml.scores", KV_F32, v->scores, n, &err));
    CHECK_OK(container_set_array(c, "tokenizer.ggml.token_type", KV_I32, v->types, n, &err));
    CHECK_OK(container_set_bool(c, "tokenizer.ggml.add_space_prefix", false, &err));
    CHECK_OK(container_set_bool(c, "tokenizer.ggml.add_bos_token", false, &err));
    hepta_tokenizer *t = NULL;
    CHECK_OK(tokenizer_from_container(c, &t, &err));
    container_close(c);
    return t;
}

static size_t put_varint(uint8_t *out, uint64_t v) {
    size_t n = 0;
    for (; v >= 0x80; v >>= 7) {
        out[n++] = (uint8_t)(v | 0x80);
    }
    out[n++] = (uint8_t)v;
    return n;
}

size_t tiny_protobuf(const tiny_vocabulary *v, int model_type, uint8_t *out) {
    size_t n = 0;
    for (int i = 0; i < v->n; i++) {
        uint8_t piece[300];
        size_t k = 0, length = strlen(v->pieces[i]);
        piece[k++] = 1 << 3 | 2;
        k += put_varint(piece + k, length);
        memcpy(piece + k, v->pieces[i], length);
        k += length;
        piece[k++] = 2 << 3 | 5;
        memcpy(piece + k, &v->scores[i], 4);
        k += 4;
        piece[k++] = 3 << 3;
        k += put_varint(piece + k, (uint64_t)v->types[i]);
        out[n++] = 1 << 3 | 2;
        n += put_varint(out + n, k);
        memcpy(out + n, piece, k);
        n += k;
    }
    uint8_t trainer[32];
    size_t k = 0;
    trainer[k++] = 3 << 3;
    trainer[k++] = (uint8_t)model_type;
    k += put_varint(trainer + k, 43 << 3); /* pad_id -1 */
    k += put_varint(trainer + k, UINT64_MAX);
    out[n++] = 2 << 3 | 2;
    out[n++] = (uint8_t)k;
    memcpy(out + n, trainer, k);
    n += k;
    static const uint8_t normalizer[] = {3 << 3 | 2, 6, 3 << 3, 1, 4 << 3, 0, 5 << 3, 1};
    memcpy(out + n, normalizer, sizeof normalizer);
    return n + sizeof normalizer;
}
