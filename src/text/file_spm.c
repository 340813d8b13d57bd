/*
 * file_spm.c - reads SentencePiece models: the .model protobuf and llama2.c's tokenizer.bin.
 *
 * A .model is a protocol buffer (sentencepiece_model.proto): pieces with score and type, the
 * trainer's settings, the normalizer's settings. A reader for the wire format
 * (protobuf.dev/programming-guides/encoding) is all that takes: (field, type) pairs, each followed
 * by a varint, 4 or 8 bytes, or a length and so many bytes.
 *
 * tokenizer.bin (karpathy/llama2.c, tokenizer.py): u32 longest token, then for each token
 * { f32 score, i32 length, bytes } to the end of the file. Numbers are little-endian.
 */
#include "text/vocabulary.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* ---- Protocol buffers -------------------------------------------------- */

typedef struct wire {
    const uint8_t *p, *end;
} wire;

enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

typedef struct field {
    uint64_t number;
    int type;
    uint64_t value; /* of numbers */
    wire bytes;     /* of WIRE_BYTES */
} field;

static bool read_varint(wire *w, uint64_t *out) {
    uint64_t v = 0;
    for (int shift = 0; shift < 64 && w->p < w->end; shift += 7) {
        uint8_t byte = *w->p++;
        v |= (uint64_t)(byte & 0x7F) << shift;
        if ((byte & 0x80) == 0) {
            *out = v;
            return true;
        }
    }
    return false;
}

/* Reads the next field; false: damaged. Call while w->p < w->end. */
static bool read_field(wire *w, field *f) {
    uint64_t tag;
    if (!read_varint(w, &tag)) {
        return false;
    }
    *f = (field){.number = tag >> 3, .type = (int)(tag & 7)};
    size_t left = (size_t)(w->end - w->p);
    switch (f->type) {
    case WIRE_VARINT:
        return read_varint(w, &f->value);
    case WIRE_32:
        if (left < 4) {
            return false;
        }
        f->value = load_u32(w->p);
        w->p += 4;
        return true;
    case WIRE_64:
        if (left < 8) {
            return false;
        }
        f->value = load_u64(w->p);
        w->p += 8;
        return true;
    case WIRE_BYTES:
        if (!read_varint(w, &f->value) || f->value > (uint64_t)(w->end - w->p)) {
            return false;
        }
        f->bytes = (wire){w->p, w->p + f->value};
        w->p += f->value;
        return true;
    default: /* groups are long gone from the format */
        return false;
    }
}

static float float_of(uint64_t bits) {
    uint32_t low = (uint32_t)bits;
    float f;
    memcpy(&f, &low, sizeof f);
    return f;
}

/* ---- sentencepiece_model.proto ----------------------------------------- */

enum { MODEL_PIECE = 1, MODEL_TRAINER = 2, MODEL_NORMALIZER = 3 };
enum { PIECE_TEXT = 1, PIECE_SCORE = 2, PIECE_TYPE = 3 };
enum {
    TRAINER_TYPE = 3,
    TRAINER_SPACE_AS_SUFFIX = 24,
    TRAINER_UNK = 40,
    TRAINER_BOS = 41,
    TRAINER_EOS = 42,
    TRAINER_PAD = 43
};
enum {
    NORMALIZER_NAME = 1,
    NORMALIZER_CHARSMAP = 2,
    NORMALIZER_DUMMY_PREFIX = 3,
    NORMALIZER_REMOVE_SPACES = 4,
    NORMALIZER_ESCAPE = 5
};
enum { TRAINER_UNIGRAM = 1, TRAINER_BPE = 2 };

static hepta_status damaged(vocabulary *v, const uint8_t *data, wire w) {
    return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                            "no SentencePiece model: the field before byte %zu is damaged",
                            (size_t)(w.p - data));
}

static hepta_status read_piece(vocabulary *v, const uint8_t *data, wire w) {
    kv_string text = {"", 0};
    float score = 0;
    uint64_t type = TOKEN_NORMAL;
    while (w.p < w.end) {
        field f;
        if (!read_field(&w, &f)) {
            return damaged(v, data, w);
        }
        if (f.number == PIECE_TEXT && f.type == WIRE_BYTES) {
            text = (kv_string){(const char *)f.bytes.p, f.value};
        } else if (f.number == PIECE_SCORE && f.type == WIRE_32) {
            score = float_of(f.value);
        } else if (f.number == PIECE_TYPE && f.type == WIRE_VARINT) {
            type = f.value;
        }
    }
    if (type < TOKEN_NORMAL || type > TOKEN_BYTE || isnan(score)) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                "piece %zu has type %" PRIu64
                                " and score %g; expected 1 to 6 and a "
                                "number",
                                v->n, type, (double)score);
    }
    return vocabulary_set(v, v->n, text, score, (token_type)type);
}

/* Ids are int32: -1, none, is written as 2^64 - 1. */
static int64_t id_of(uint64_t value) {
    return value > INT32_MAX ? -1 : (int64_t)value;
}

static hepta_status read_trainer(vocabulary *v, const uint8_t *data, wire w) {
    uint64_t type = TRAINER_UNIGRAM;
    bool suffix = false;
    while (w.p < w.end) {
        field f;
        if (!read_field(&w, &f)) {
            return damaged(v, data, w);
        }
        if (f.type != WIRE_VARINT) {
            continue;
        }
        switch (f.number) {
        case TRAINER_TYPE:
            type = f.value;
            break;
        case TRAINER_SPACE_AS_SUFFIX:
            suffix = f.value != 0;
            break;
        case TRAINER_UNK:
            v->unknown = id_of(f.value);
            break;
        case TRAINER_BOS:
            v->bos = id_of(f.value);
            break;
        case TRAINER_EOS:
            v->eos = id_of(f.value);
            break;
        case TRAINER_PAD:
            v->padding = id_of(f.value);
            break;
        default:
            break;
        }
    }
    if (type != TRAINER_BPE) {
        return vocabulary_error(
            v, HEPTA_ERROR_UNSUPPORTED,
            "a SentencePiece model of type %s; only BPE is built in (no model of "
            "the LLaMA family uses another)",
            type == TRAINER_UNIGRAM ? "unigram" : "word or character");
    }
    if (suffix) {
        return vocabulary_error(v, HEPTA_ERROR_UNSUPPORTED,
                                "a SentencePiece model that writes spaces as suffixes");
    }
    return HEPTA_OK;
}

static hepta_status read_normalizer(vocabulary *v, const uint8_t *data, wire w) {
    kv_string name = {"", 0};
    bool charsmap = false, escape = true;
    while (w.p < w.end) {
        field f;
        if (!read_field(&w, &f)) {
            return damaged(v, data, w);
        }
        if (f.number == NORMALIZER_NAME && f.type == WIRE_BYTES) {
            name = (kv_string){(const char *)f.bytes.p, f.value};
        } else if (f.number == NORMALIZER_CHARSMAP && f.type == WIRE_BYTES) {
            charsmap = f.value > 0;
        } else if (f.type == WIRE_VARINT && f.number == NORMALIZER_DUMMY_PREFIX) {
            v->add_space_prefix = setting_of(f.value != 0);
        } else if (f.type == WIRE_VARINT && f.number == NORMALIZER_REMOVE_SPACES) {
            v->remove_extra_whitespaces = setting_of(f.value != 0);
        } else if (f.type == WIRE_VARINT && f.number == NORMALIZER_ESCAPE) {
            escape = f.value != 0;
        }
    }
    if (charsmap || !escape) {
        return vocabulary_error(
            v, HEPTA_ERROR_UNSUPPORTED,
            "a SentencePiece model with the normalizer \"%.*s\"; only \"identity\" "
            "is built in",
            (int)(name.n < 60 ? name.n : 60), name.data);
    }
    return HEPTA_OK;
}

hepta_status spm_model_read(vocabulary *v, const uint8_t *data, size_t n) {
    wire w = {data, data + n};
    bool trainer = false;
    v->model = "llama";
    v->pre = "default";
    v->has_scores = true;
    v->unknown = 0; /* the defaults of sentencepiece_model.proto */
    v->bos = 1;
    v->eos = 2;
    v->add_space_prefix = SETTING_TRUE;
    v->remove_extra_whitespaces = SETTING_TRUE;
    while (w.p < w.end) {
        field f;
        if (!read_field(&w, &f)) {
            return damaged(v, data, w);
        }
        hepta_status status = HEPTA_OK;
        if (f.number == MODEL_PIECE && f.type == WIRE_BYTES) {
            status = read_piece(v, data, f.bytes);
        } else if (f.number == MODEL_TRAINER && f.type == WIRE_BYTES) {
            status = read_trainer(v, data, f.bytes);
            trainer = true;
        } else if (f.number == MODEL_NORMALIZER && f.type == WIRE_BYTES) {
            status = read_normalizer(v, data, f.bytes);
        }
        if (status != HEPTA_OK) {
            return status;
        }
    }
    if (v->n == 0 || !trainer) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                "no SentencePiece model: %zu pieces and %s trainer settings", v->n,
                                trainer ? "its" : "no");
    }
    return HEPTA_OK;
}

/* ---- llama2.c's tokenizer.bin ------------------------------------------ */

enum { LLAMA2C_MAX_TOKEN = 65536 };

/* Spaces back to U+2581, as SentencePiece writes them. */
static bool escape_spaces(vocabulary *v, kv_string *s) {
    size_t spaces = 0;
    for (uint64_t i = 0; i < s->n; i++) {
        spaces += s->data[i] == ' ';
    }
    if (spaces == 0) {
        return true;
    }
    char *out = arena_alloc(&v->memory, (size_t)s->n + 2 * spaces, 1);
    if (out == NULL) {
        return false;
    }
    size_t k = 0;
    for (uint64_t i = 0; i < s->n; i++) {
        if (s->data[i] == ' ') {
            memcpy(out + k, "\xE2\x96\x81", 3);
            k += 3;
        } else {
            out[k++] = s->data[i];
        }
    }
    *s = (kv_string){out, k};
    return true;
}

hepta_status llama2c_tokenizer_read(vocabulary *v, const uint8_t *data, size_t n) {
    /* ids 0 to 2; the exporter wrote line breaks around the names of 1 and 2 */
    static const kv_string names[] = {{"<unk>", 5}, {"<s>", 3}, {"</s>", 4}};
    v->model = "llama";
    v->pre = "default";
    v->has_scores = true;
    v->unknown = 0;
    v->bos = 1;
    v->eos = 2;
    v->add_bos = SETTING_TRUE;
    v->add_space_prefix = SETTING_TRUE;
    v->remove_extra_whitespaces = SETTING_FALSE;
    size_t at = 4;
    while (at < n) {
        uint32_t length = n - at >= 8 ? load_u32(data + at + 4) : 0;
        if (n - at < 8 || length > LLAMA2C_MAX_TOKEN || length > n - at - 8) {
            return vocabulary_error(
                v, HEPTA_ERROR_FORMAT,
                "a tokenizer of llama2.c that ends inside token %zu, which begins "
                "at byte %zu of %zu",
                v->n, at, n);
        }
        float score = float_of(load_u32(data + at));
        if (isnan(score)) {
            return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                    "the score of token %zu at byte %zu is not a number", v->n, at);
        }
        kv_string text = {(const char *)data + at + 8, length};
        token_type type = v->n == 0                        ? TOKEN_UNKNOWN
                          : v->n < 3                       ? TOKEN_CONTROL
                          : length == 0                    ? TOKEN_UNUSED
                          : vocabulary_is_byte_token(text) ? TOKEN_BYTE
                                                           : TOKEN_NORMAL;
        if (v->n < 3) {
            text = names[v->n];
        } else if (!escape_spaces(v, &text)) {
            return vocabulary_out_of_memory(v);
        }
        hepta_status status = vocabulary_set(v, v->n, text, score, type);
        if (status != HEPTA_OK) {
            return status;
        }
        at += 8 + (size_t)length;
    }
    if (v->n < 3) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                "a tokenizer of llama2.c with %zu tokens; expected 3 or more",
                                v->n);
    }
    return HEPTA_OK;
}
