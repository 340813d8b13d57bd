/*
 * vocabulary.c - collecting a tokenizer's parts and writing them into a container, see
 * vocabulary.h.
 */
#include "text/vocabulary.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Ids may leave gaps (unused rows of the embedding), but a small file must not ask for much. */
enum { MAX_GAP = 1 << 16 };

void vocabulary_init(vocabulary *v, const char *path, hepta_error *err) {
    *v = (vocabulary){.path = path, .err = err, .bos = -1, .eos = -1, .unknown = -1, .padding = -1};
}

void vocabulary_free(vocabulary *v) {
    memory_free(v->tokens);
    memory_free(v->scores);
    memory_free(v->types);
    memory_free(v->merges);
    memory_free(v->strip_left.ids);
    memory_free(v->strip_right.ids);
    memory_free(v->end_ids.ids);
    arena_free(&v->memory);
}

hepta_status vocabulary_error(vocabulary *v, hepta_status status, const char *format, ...) {
    char message[384];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    size_t n = strlen(v->path);
    return error_set(v->err, status, "%s: %s", v->path + (n > 120 ? n - 120 : 0), message);
}

hepta_status vocabulary_out_of_memory(vocabulary *v) {
    return vocabulary_error(v, HEPTA_ERROR_MEMORY, "out of memory reading a tokenizer");
}

/* Room for `wanted` items; false when memory is short. */
static bool reserve(void **items, size_t n, size_t *room, size_t wanted, size_t size) {
    size_t more = *room;
    while (more < wanted) {
        more = more < 64 ? 64 : 2 * more;
    }
    if (more == *room) {
        return true;
    }
    void *bigger = memory_resize(*items, n, more, size);
    if (bigger == NULL) {
        return false;
    }
    *items = bigger;
    *room = more;
    return true;
}

static bool reserve_tokens(vocabulary *v, size_t wanted) {
    size_t tokens = v->room, scores = v->room, types = v->room;
    if (!reserve((void **)&v->tokens, v->n, &tokens, wanted, sizeof *v->tokens) ||
        !reserve((void **)&v->scores, v->n, &scores, wanted, sizeof *v->scores) ||
        !reserve((void **)&v->types, v->n, &types, wanted, sizeof *v->types)) {
        return false;
    }
    v->room = tokens;
    return true;
}

hepta_status vocabulary_set(vocabulary *v, uint64_t id, kv_string text, float score,
                            token_type type) {
    uint64_t dense = v->n > v->expected ? v->n : v->expected;
    if (id >= TOKENIZER_MAX_TOKENS || id > 2 * dense + MAX_GAP) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                "token id %" PRIu64 " in a vocabulary of %zu tokens so far", id,
                                v->n);
    }
    if (!reserve_tokens(v, (size_t)id + 1)) {
        return vocabulary_out_of_memory(v);
    }
    kv_string *token = &v->tokens[id];
    if (id < v->n && token->data != NULL &&
        (token->n != text.n || memcmp(token->data, text.data, (size_t)text.n) != 0)) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                "token id %" PRIu64 " is both \"%.*s\" and \"%.*s\"", id,
                                (int)(token->n < 60 ? token->n : 60), token->data,
                                (int)(text.n < 60 ? text.n : 60), text.data);
    }
    token->data = text.n > 0 ? text.data : "";
    token->n = text.n;
    v->scores[id] = score;
    v->types[id] = (int32_t)type;
    v->n = id >= v->n ? (size_t)id + 1 : v->n;
    return HEPTA_OK;
}

hepta_status vocabulary_add_merge(vocabulary *v, kv_string rule) {
    if (!reserve((void **)&v->merges, v->n_merges, &v->merge_room, v->n_merges + 1,
                 sizeof *v->merges)) {
        return vocabulary_out_of_memory(v);
    }
    v->merges[v->n_merges++] = rule;
    v->has_merges = true;
    return HEPTA_OK;
}

hepta_status vocabulary_add_id(vocabulary *v, id_list *list, uint32_t id) {
    if (!reserve((void **)&list->ids, list->n, &list->room, list->n + 1, sizeof *list->ids)) {
        return vocabulary_out_of_memory(v);
    }
    list->ids[list->n++] = id;
    return HEPTA_OK;
}

int64_t vocabulary_find(const vocabulary *v, const char *text, size_t n) {
    for (size_t i = 0; i < v->n; i++) {
        if (v->tokens[i].data != NULL && v->tokens[i].n == n &&
            memcmp(v->tokens[i].data, text, n) == 0) {
            return (int64_t)i;
        }
    }
    return -1;
}

/* ---- Storing ----------------------------------------------------------- */

/* Ids that nothing was set for become unused tokens, as other converters write them. */
static hepta_status fill_gaps(vocabulary *v) {
    for (size_t i = 0; i < v->n; i++) {
        if (v->tokens[i].data == NULL) {
            char name[32];
            int n = snprintf(name, sizeof name, "[PAD%zu]", i);
            char *copy = arena_copy_string(&v->memory, name, (size_t)n);
            if (copy == NULL) {
                return vocabulary_out_of_memory(v);
            }
            v->tokens[i] = (kv_string){copy, (uint64_t)n};
            v->types[i] = TOKEN_UNUSED;
        }
    }
    return HEPTA_OK;
}

void vocabulary_remove_old(container *c) {
    static const char *const prefixes[] = {"tokenizer.ggml.", "tokenizer.hepta."};
    for (size_t i = c->n_kvs; i-- > 0;) {
        char key[128];
        kv_string k = c->kvs[i].key;
        for (size_t p = 0; p < 2; p++) {
            size_t n = strlen(prefixes[p]);
            if (k.n >= n && k.n < sizeof key && memcmp(k.data, prefixes[p], n) == 0) {
                memcpy(key, k.data, (size_t)k.n);
                key[k.n] = '\0';
                container_remove(c, key);
                break;
            }
        }
    }
}

static hepta_status store_string(container *c, const char *key, const char *s, hepta_error *err) {
    return s == NULL ? HEPTA_OK : container_set_string(c, key, s, strlen(s), err);
}

static hepta_status store_id(vocabulary *v, container *c, const char *key, int64_t id) {
    if (id < 0) {
        return HEPTA_OK;
    }
    if (id >= (int64_t)v->n) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                "%s is %" PRId64 "; the vocabulary has %zu tokens", key, id, v->n);
    }
    return container_set_u32(c, key, (uint32_t)id, v->err);
}

static hepta_status store_ids(container *c, const char *key, const id_list *list,
                              hepta_error *err) {
    return list->n == 0 ? HEPTA_OK : container_set_array(c, key, KV_U32, list->ids, list->n, err);
}

static hepta_status store_setting(container *c, const char *key, setting s, hepta_error *err) {
    return s == SETTING_ABSENT ? HEPTA_OK : container_set_bool(c, key, s == SETTING_TRUE, err);
}

hepta_status vocabulary_store(vocabulary *v, container *c) {
    hepta_error *err = v->err;
    hepta_status status = fill_gaps(v);
    if (status != HEPTA_OK) {
        return status;
    }
    if (v->n == 0) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT, "the vocabulary is empty");
    }
    vocabulary_remove_old(c);
    const struct {
        const char *key;
        int64_t id;
    } ids[] = {{"tokenizer.ggml.bos_token_id", v->bos},
               {"tokenizer.ggml.eos_token_id", v->eos},
               {"tokenizer.ggml.unknown_token_id", v->unknown},
               {"tokenizer.ggml.padding_token_id", v->padding}};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        if ((status = store_id(v, c, ids[i].key, ids[i].id)) != HEPTA_OK) {
            return status;
        }
    }
    const struct {
        const char *key;
        setting value;
    } settings[] = {{"tokenizer.ggml.add_bos_token", v->add_bos},
                    {"tokenizer.ggml.add_eos_token", v->add_eos},
                    {"tokenizer.ggml.add_space_prefix", v->add_space_prefix},
                    {"tokenizer.ggml.remove_extra_whitespaces", v->remove_extra_whitespaces},
                    {TOKENIZER_KEY_NFC, v->nfc},
                    {TOKENIZER_KEY_IGNORE_MERGES, v->ignore_merges},
                    {TOKENIZER_KEY_SPLIT_SPACES, v->split_spaces}};
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        if ((status = store_setting(c, settings[i].key, settings[i].value, err)) != HEPTA_OK) {
            return status;
        }
    }
    if ((status = store_string(c, "tokenizer.ggml.model", v->model, err)) != HEPTA_OK ||
        (status = store_string(c, "tokenizer.ggml.pre", v->pre, err)) != HEPTA_OK ||
        (status = store_string(c, TOKENIZER_KEY_SPACE_PREFIX, v->space_prefix, err)) != HEPTA_OK ||
        (status = store_ids(c, TOKENIZER_KEY_STRIP_LEFT, &v->strip_left, err)) != HEPTA_OK ||
        (status = store_ids(c, TOKENIZER_KEY_STRIP_RIGHT, &v->strip_right, err)) != HEPTA_OK ||
        (status = store_ids(c, TOKENIZER_KEY_END_IDS, &v->end_ids, err)) != HEPTA_OK ||
        (status = container_set_array(c, "tokenizer.ggml.tokens", KV_STRING, v->tokens, v->n,
                                      err)) != HEPTA_OK ||
        (status = container_set_array(c, "tokenizer.ggml.token_type", KV_I32, v->types, v->n,
                                      err)) != HEPTA_OK) {
        return status;
    }
    if (v->has_scores) {
        status = container_set_array(c, "tokenizer.ggml.scores", KV_F32, v->scores, v->n, err);
    }
    if (status == HEPTA_OK && v->has_merges) {
        status =
            container_set_array(c, "tokenizer.ggml.merges", KV_STRING, v->merges, v->n_merges, err);
    }
    if (status == HEPTA_OK && v->chat_template.data != NULL) {
        status = container_set_string(c, "tokenizer.chat_template", v->chat_template.data,
                                      (size_t)v->chat_template.n, err);
    }
    return status;
}

bool vocabulary_is_byte_token(kv_string s) {
    return s.n == 6 && memcmp(s.data, "<0x", 3) == 0 && s.data[5] == '>';
}
