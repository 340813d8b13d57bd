/*
 * vocabulary.h - a tokenizer as the readers of tokenizer files see it, before it goes into a
 * container's tokenizer.* keys.
 *
 * A reader fills a `vocabulary`; vocabulary_store writes all of it, so that a file that turns out
 * to be damaged leaves the container as it was.
 */
#ifndef TEXT_VOCABULARY_H
#define TEXT_VOCABULARY_H

#include "text/tokenizer.h"

#include <jansson.h>

/* A growing list of ids under one of the TOKENIZER_KEY_* keys. */
typedef struct id_list {
    uint32_t *ids;
    size_t n, room;
} id_list;

typedef enum setting { SETTING_ABSENT = 0, SETTING_FALSE, SETTING_TRUE } setting;

static inline setting setting_of(bool value) {
    return value ? SETTING_TRUE : SETTING_FALSE;
}

typedef struct vocabulary {
    const char *path; /* of the file, for messages */
    hepta_error *err;
    arena memory;
    const char *model;        /* tokenizer.ggml.model: "llama" or "gpt2" */
    const char *pre;          /* tokenizer.ggml.pre, or NULL */
    const char *space_prefix; /* TOKENIZER_KEY_SPACE_PREFIX, or NULL */
    kv_string *tokens;        /* (n); data is NULL where an id is not taken */
    float *scores;            /* (n) */
    int32_t *types;           /* (n), token_type */
    size_t n, room;
    size_t expected; /* tokens that the file says it has: ids may come in any order */
    bool has_scores, has_merges;
    kv_string *merges;
    size_t n_merges, merge_room;
    int64_t bos, eos, unknown, padding; /* -1: none */
    setting add_bos, add_eos, add_space_prefix, remove_extra_whitespaces;
    setting nfc, ignore_merges, split_spaces;
    id_list strip_left, strip_right, end_ids;
    kv_string chat_template;
} vocabulary;

void vocabulary_init(vocabulary *v, const char *path, hepta_error *err);
void vocabulary_free(vocabulary *v);

/*
 * Sets token `id`, which must be free or hold the same text (its type and score are replaced
 * then). `text` must stay valid until vocabulary_store. Refuses ids that are far from dense.
 */
hepta_status vocabulary_set(vocabulary *v, uint64_t id, kv_string text, float score,
                            token_type type);
hepta_status vocabulary_add_merge(vocabulary *v, kv_string rule);
hepta_status vocabulary_add_id(vocabulary *v, id_list *list, uint32_t id);
/* Id of the token of this text, -1: none. Linear. */
int64_t vocabulary_find(const vocabulary *v, const char *text, size_t n);

/* Replaces the container's tokenizer by this one. */
hepta_status vocabulary_store(vocabulary *v, container *c);
void vocabulary_remove_old(container *c); /* what there is of one */

/* HEPTA_ERROR_FORMAT or _UNSUPPORTED with the path in front. */
hepta_status vocabulary_error(vocabulary *v, hepta_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
hepta_status vocabulary_out_of_memory(vocabulary *v);

/* True for the name of a byte token: <0xHH>. */
bool vocabulary_is_byte_token(kv_string s);

/* ---- Readers; the files' bytes stay mapped until vocabulary_store -------- */

hepta_status spm_model_read(vocabulary *v, const uint8_t *data, size_t n); /* protobuf */
hepta_status llama2c_tokenizer_read(vocabulary *v, const uint8_t *data, size_t n);
hepta_status tiktoken_read(vocabulary *v, const uint8_t *data, size_t n);
/* `root` stays alive until vocabulary_store; so for the others that take JSON. */
hepta_status tokenizer_json_read(vocabulary *v, json_t *root);
hepta_status vocab_json_read(vocabulary *v, json_t *root);
hepta_status merges_txt_read(vocabulary *v, const uint8_t *data, size_t n);
/* tokenizer_config.json: added tokens, BOS and EOS, chat template. */
hepta_status tokenizer_config_read(vocabulary *v, const json_t *root);
/* generation_config.json or config.json: ids of BOS and EOS. */
hepta_status generation_config_read(vocabulary *v, const json_t *root);

#endif
