/*
 * report.c - hepta report: what quantizing did to each tensor.
 *
 * Without a text: bits, size and relative error of the weights. With one: how the inputs of all
 * linear layers are spread in the base model, before and after the rotation that quantized layers
 * apply, and the error of each layer's output on these inputs, from the weights alone and with the
 * int8 inputs of the real computation. Errors of one layer are not carried to the next: they are
 * what this layer adds.
 *
 * Sums run in the order of rows and tokens in binary64: threads do not change them.
 */
#include "cli/report.h"

#include "base/base.h"
#include "format/container.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW = 512, DEFAULT_TOKENS = 1024, GROUP = PACKED_STRIP };

const char *const kind_names[KINDS] = {"attn_q", "attn_k",   "attn_v",    "attn_output", "ffn_gate",
                                       "ffn_up", "ffn_down", "embedding", "output"};
const char *const input_names[LLAMA_INPUTS] = {"attn_q, k, v", "attn_output", "ffn_gate, up",
                                               "ffn_down", "output"};

typedef struct settings {
    const char *paths[2], *out, *text, *tokenizer;
    uint32_t limit;
    int threads;
    bool json, quiet;
} settings;

typedef struct reporter {
    settings o;
    report_data r;
    progress p;
    hepta_error *err;
    hepta_status status;      /* of the observer */
    float *scratch, *rotated; /* (WINDOW, width) */
    activation *activations;  /* (WINDOW) */
    int8_t *quantized;        /* (WINDOW, width) */
    uint32_t width;
    uint64_t done, total; /* of progress */
} reporter;

const char *matrix_name(const report_matrix *m) {
    return m->base->source->name;
}

/* ---- Pairing ----------------------------------------------------------- */

static hepta_status check_pair(const reporter *w) {
    const hepta_model *a = w->r.base, *b = w->r.quantized;
    const hepta_model_info *i = &a->info, *j = &b->info;
    bool same = i->n_vocab == j->n_vocab && i->n_embd == j->n_embd && i->n_layer == j->n_layer &&
                i->n_head == j->n_head && i->n_head_kv == j->n_head_kv &&
                i->head_dim == j->head_dim && i->n_ff == j->n_ff;
    bool tied = a->head.source == a->embedding.source;
    if (!same || tied != (b->head.source == b->embedding.source)) {
        return error_set(w->err, HEPTA_ERROR_ARGUMENT,
                         "%s and %s are models of different shapes: nothing to compare",
                         w->o.paths[0], w->o.paths[1]);
    }
    if (a->rope_interleaved != b->rope_interleaved) {
        return error_set(w->err, HEPTA_ERROR_ARGUMENT,
                         "%s and %s order the rows of attn_q and attn_k differently (GGUF's and "
                         "Hugging Face's way); compare with the file that was quantized",
                         w->o.paths[0], w->o.paths[1]);
    }
    if (a->info.quantized) {
        return error_set(w->err, HEPTA_ERROR_ARGUMENT,
                         "%s is quantized; the first model must be the unquantized one",
                         w->o.paths[0]);
    }
    return HEPTA_OK;
}

static void add_matrix(report_data *r, const matrix *base, const matrix *quantized, uint32_t layer,
                       uint32_t kind) {
    r->matrices[r->n_matrices++] = (report_matrix){.base = base,
                                                   .quantized = quantized,
                                                   .layer = layer,
                                                   .kind = kind,
                                                   .output_error = NAN,
                                                   .total_error = NAN};
}

static hepta_status pair_matrices(reporter *w) {
    report_data *r = &w->r;
    const uint32_t n_layer = r->base->info.n_layer;
    r->matrices = calloc((size_t)n_layer * LAYER_KINDS + 2, sizeof *r->matrices);
    if (r->matrices == NULL) {
        return error_set(w->err, HEPTA_ERROR_MEMORY, "out of memory for %u layers", n_layer);
    }
    for (uint32_t l = 0; l < n_layer; l++) {
        const llama_layer *a = &r->base->layers[l], *b = &r->quantized->layers[l];
        const matrix *const bases[LAYER_KINDS] = {&a->wq,   &a->wk, &a->wv,  &a->wo,
                                                  &a->gate, &a->up, &a->down};
        const matrix *const others[LAYER_KINDS] = {&b->wq,   &b->wk, &b->wv,  &b->wo,
                                                   &b->gate, &b->up, &b->down};
        for (uint32_t kind = 0; kind < LAYER_KINDS; kind++) {
            add_matrix(r, bases[kind], others[kind], l, kind);
        }
    }
    add_matrix(r, &r->base->embedding, &r->quantized->embedding, n_layer, KIND_EMBEDDING);
    if (r->base->head.source != r->base->embedding.source) {
        add_matrix(r, &r->base->head, &r->quantized->head, n_layer, KIND_HEAD);
    }
    return HEPTA_OK;
}

static void measure_sizes(report_data *r) {
    uint64_t total = 0;
    const container *c = r->quantized->file;
    for (size_t i = 0; i < c->n_tensors; i++) {
        total += c->tensors[i].n_bytes;
    }
    for (size_t i = 0; i < r->n_matrices; i++) {
        report_matrix *m = &r->matrices[i];
        double bytes = (double)m->quantized->source->n_bytes;
        m->bits = 8 * bytes / ((double)m->base->n_rows * m->base->n_cols);
        m->share = bytes / (double)total;
    }
}

/* ---- Weights ----------------------------------------------------------- */

/* Row r as floats: rotated and padded for a packed matrix. scratch: a byte for each column. */
static void read_row(const kernels *k, const matrix *a, uint32_t r, float *y, void *scratch) {
    if (a->type == TENSOR_PACKED) {
        k->unpack_row(&a->packed, r, y, scratch);
    } else {
        kernels_tensor_row(k, a->source, r, y);
    }
}

/* Squares of row r: of the base's weights, and of their difference. scratch: 12 * width floats. */
static void compare_row(const report_data *r, const report_matrix *m, uint32_t row, float *scratch,
                        size_t width, double *square, double *difference) {
    const kernels *k = r->base->kernels;
    float *a = scratch, *b = a + width, *more = b + width;
    read_row(k, m->base, row, a, more);
    read_row(k, m->quantized, row, b, more);
    if (m->quantized->rotation != NULL) {
        k->rotate_inverse(m->quantized->rotation, b, more);
    }
    *square = 0;
    *difference = 0;
    for (uint32_t c = 0; c < m->base->n_cols; c++) {
        double x = (double)a[c], d = (double)b[c] - x;
        *square += x * x;
        *difference += d * d;
    }
}

static double relative(double difference, double base) {
    return base > 0 ? sqrt(difference / base) : difference > 0 ? INFINITY : 0;
}

static hepta_status compare_weights(reporter *w, report_matrix *m) {
    const uint32_t n_rows = m->base->n_rows;
    const size_t width = w->width;
    double *sums = malloc((size_t)n_rows * 2 * sizeof *sums);
    float *scratch = malloc((size_t)w->o.threads * 12 * width * sizeof *scratch);
    hepta_status status = HEPTA_OK;
    if (sums == NULL || scratch == NULL) {
        status = error_set(w->err, HEPTA_ERROR_MEMORY, "out of memory for %u rows", n_rows);
        goto done;
    }
#pragma omp parallel for num_threads(w->o.threads) schedule(static)
    for (uint32_t row = 0; row < n_rows; row++) {
        compare_row(&w->r, m, row, scratch + (size_t)omp_get_thread_num() * 12 * width, width,
                    &sums[2 * row], &sums[2 * row + 1]);
    }
    double square = 0, difference = 0;
    for (uint32_t row = 0; row < n_rows; row++) {
        square += sums[2 * row];
        difference += sums[2 * row + 1];
    }
    m->error = relative(difference, square);
done:
    free(sums);
    free(scratch);
    return status;
}

static hepta_status interrupted_error(const reporter *w) {
    return error_set(w->err, HEPTA_ERROR_INTERRUPTED, "interrupted; nothing was written");
}

static hepta_status measure_weights(reporter *w) {
    hepta_status status = HEPTA_OK;
    for (size_t i = 0; i < w->r.n_matrices && status == HEPTA_OK; i++) {
        report_matrix *m = &w->r.matrices[i];
        status = compare_weights(w, m);
        w->done += (uint64_t)m->base->n_rows * m->base->n_cols;
        if (!progress_update(&w->p, matrix_name(m), w->done, w->total) && status == HEPTA_OK) {
            status = interrupted_error(w);
        }
    }
    return status;
}

/* ---- Inputs ------------------------------------------------------------ */

static void add_values(spread *s, const float *x, size_t n_tokens, size_t n, size_t stride) {
    for (size_t t = 0; t < n_tokens; t++, x += stride) {
        double sum2 = 0, sum4 = 0, peak = 0;
        for (size_t i = 0; i < n; i++) {
            double v = (double)x[i], v2 = v * v;
            bool first = s->n == 0 && i == 0;
            s->min = first || v < s->min ? v : s->min;
            s->max = first || v > s->max ? v : s->max;
            peak = fabs(v) > peak ? fabs(v) : peak;
            sum2 += v2;
            sum4 += v2 * v2;
        }
        s->n += n;
        s->sum2 += sum2;
        s->sum4 += sum4;
        if (sum2 > 0) {
            s->sum_peak += peak / sqrt(sum2 / (double)n);
            s->n_tokens++;
        }
    }
}

static void finish_spread(spread *s) {
    if (s->n > 0) {
        double mean2 = s->sum2 / (double)s->n;
        s->rms = sqrt(mean2);
        s->kurtosis = mean2 > 0 ? s->sum4 / (double)s->n / (mean2 * mean2) : 0;
        s->peak = s->n_tokens > 0 ? s->sum_peak / (double)s->n_tokens : 0;
    }
}

/* The rotated, quantized inputs of n tokens. */
static void rotate_inputs(reporter *w, const rotation *rot, const float *x, uint32_t n) {
    const kernels *k = w->r.base->kernels;
    const size_t width = w->width;
#pragma omp parallel for num_threads(w->o.threads) schedule(static)
    for (uint32_t t = 0; t < n; t++) {
        float *y = w->rotated + t * width, *scratch = w->scratch + t * width;
        activation *a = &w->activations[t];
        memcpy(y, x + (size_t)t * rot->n, rot->n * sizeof *x);
        k->rotate(rot, y, scratch);
        a->q = w->quantized + t * width;
        k->quantize_activation(y, rot->n_padded, w->quantized + t * width, &a->scale, &a->sum);
    }
}

/* Memory of one thread of compare_group: floats of a row and scratch; of outputs of the base and of
 * the weights; of outputs with int8 inputs, which lie at their row's number. */
#define ROW_FLOATS(width) (2 * (size_t)(width) + KERNELS_SCRATCH_BYTES(width) / sizeof(float))
#define OUTPUT_FLOATS ((size_t)2 * GROUP * WINDOW)
#define TOTAL_FLOATS(n_rows) ((size_t)GROUP * WINDOW + (n_rows))

/* Outputs of rows [begin, end), at most GROUP, for n inputs x; sums of squares: base, output,
 * total. */
static void compare_group(const reporter *w, const report_matrix *m, const float *x, uint32_t n,
                          uint32_t begin, uint32_t end, float *memory, double sums[3]) {
    const kernels *k = w->r.base->kernels;
    const matrix *a = m->base, *b = m->quantized;
    float *row = memory, *scratch = row + w->width, *base = row + ROW_FLOATS(w->width);
    float *output = base + GROUP * WINDOW, *total = base + OUTPUT_FLOATS;
    bool packed = b->type == TENSOR_PACKED;
    for (uint32_t r = begin; r < end; r++) {
        read_row(k, a, r, row, scratch);
        k->matmul_f32(row, 1, a->n_cols, x, a->n_cols, n, base + (r - begin), GROUP);
        read_row(k, b, r, row, scratch);
        if (packed) {
            k->matmul_f32(row, 1, b->packed.n_cols, w->rotated, w->width, n, output + (r - begin),
                          GROUP);
        } else {
            k->matmul_f32(row, 1, a->n_cols, x, a->n_cols, n, output + (r - begin), GROUP);
        }
    }
    if (packed) {
        k->matmul_packed(&b->packed, begin, end, w->activations, n, total, GROUP,
                         (uint8_t *)scratch);
        total += begin;
    } else {
        total = output;
    }
    sums[0] = sums[1] = sums[2] = 0;
    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t i = 0; i < end - begin; i++) {
            double y = (double)base[t * GROUP + i], d = (double)output[t * GROUP + i] - y;
            double e = (double)total[t * GROUP + i] - y;
            sums[0] += y * y;
            sums[1] += d * d;
            sums[2] += e * e;
        }
    }
}

static hepta_status compare_outputs(reporter *w, report_matrix *m, const float *x, uint32_t n) {
    const uint32_t n_rows = m->base->n_rows, n_groups = (n_rows + GROUP - 1) / GROUP;
    const size_t thread_floats = ROW_FLOATS(w->width) + OUTPUT_FLOATS + TOTAL_FLOATS(n_rows);
    double *sums = malloc((size_t)n_groups * 3 * sizeof *sums);
    float *memory = malloc((size_t)w->o.threads * thread_floats * sizeof *memory);
    hepta_status status = HEPTA_OK;
    if (sums == NULL || memory == NULL) {
        status = error_set(w->err, HEPTA_ERROR_MEMORY, "out of memory for %u rows", n_rows);
        goto done;
    }
#pragma omp parallel for num_threads(w->o.threads) schedule(static)
    for (uint32_t i = 0; i < n_groups; i++) {
        float *mine = memory + (size_t)omp_get_thread_num() * thread_floats;
        uint32_t begin = i * GROUP, end = n_rows - begin < GROUP ? n_rows : begin + GROUP;
        compare_group(w, m, x, n, begin, end, mine, &sums[3 * (size_t)i]);
    }
    for (uint32_t i = 0; i < n_groups; i++) {
        m->sum_base += sums[3 * (size_t)i];
        m->sum_output += sums[3 * (size_t)i + 1];
        m->sum_total += sums[3 * (size_t)i + 2];
    }
done:
    free(sums);
    free(memory);
    return status;
}

/* The matrices that an input feeds: `first` and how many follow; 0 if they are not measured. */
static size_t fed_matrices(const report_data *r, uint32_t layer, llama_input input,
                           report_matrix **first) {
    static const struct {
        uint32_t first, n;
    } fed[LAYER_INPUTS] = {{KIND_Q, 3}, {KIND_O, 1}, {KIND_GATE, 2}, {KIND_DOWN, 1}};
    if (input == LLAMA_HEAD_IN) { /* the last matrix: the head, or the embedding if tied */
        *first = &r->matrices[r->n_matrices - 1];
        return 1;
    }
    *first = &r->matrices[(size_t)layer * LAYER_KINDS + fed[input].first];
    return fed[input].n;
}

static void observe(void *context, uint32_t layer, llama_input input, const float *x, uint32_t n) {
    reporter *w = context;
    report_data *r = &w->r;
    report_matrix *m;
    const size_t at = (size_t)layer * LAYER_INPUTS + (input == LLAMA_HEAD_IN ? 0 : (size_t)input);
    size_t k = fed_matrices(r, layer, input, &m);
    const rotation *rot = NULL;
    for (size_t i = 0; i < k; i++) {
        rot = m[i].quantized->rotation != NULL ? m[i].quantized->rotation : rot;
    }
    if (w->status != HEPTA_OK) {
        return;
    }
    add_values(&r->inputs[at], x, n, m->base->n_cols, m->base->n_cols);
    if (rot != NULL) {
        rotate_inputs(w, rot, x, n);
        add_values(&r->rotated[at], w->rotated, n, rot->n, w->width);
    }
    for (size_t i = 0; i < k && w->status == HEPTA_OK; i++) {
        w->status = compare_outputs(w, &m[i], x, n);
        w->done += (uint64_t)m[i].base->n_rows * m[i].base->n_cols;
        if (!progress_update(&w->p, matrix_name(&m[i]), w->done, w->total) &&
            w->status == HEPTA_OK) {
            w->status = interrupted_error(w);
        }
    }
}

/* Runs the base over the text in windows that each begin afresh. */
static hepta_status run_windows(reporter *w, hepta_session *session, int32_t bos,
                                const int32_t *tokens, size_t n) {
    const size_t n_bos = bos >= 0 ? 1 : 0, room = session->n_batch - n_bos;
    for (size_t at = 0; at < n && w->status == HEPTA_OK; at += room) {
        size_t k = n - at < room ? n - at : room;
        if (bos >= 0) {
            session->chunk[0] = (gpu_token){.id = bos};
        }
        for (size_t i = 0; i < k; i++) {
            session->chunk[i + n_bos] =
                (gpu_token){.id = tokens[at + i], .position = (uint32_t)(i + n_bos)};
        }
        llama_observe(session, (uint32_t)(k + n_bos), NULL,
                      &(llama_observer){.input = observe, .context = w});
    }
    return w->status;
}

static hepta_status allocate_inputs(reporter *w) {
    report_data *r = &w->r;
    r->n_inputs = (size_t)r->base->info.n_layer * LAYER_INPUTS + 1;
    r->inputs = calloc(r->n_inputs, sizeof *r->inputs);
    r->rotated = calloc(r->n_inputs, sizeof *r->rotated);
    w->scratch = malloc((size_t)WINDOW * w->width * sizeof *w->scratch);
    w->rotated = malloc((size_t)WINDOW * w->width * sizeof *w->rotated);
    w->quantized = malloc((size_t)WINDOW * w->width);
    w->activations = malloc(WINDOW * sizeof *w->activations);
    if (r->inputs == NULL || r->rotated == NULL || w->scratch == NULL || w->rotated == NULL ||
        w->quantized == NULL || w->activations == NULL) {
        return error_set(w->err, HEPTA_ERROR_MEMORY, "out of memory for the inputs of %u tokens",
                         (unsigned)WINDOW);
    }
    return HEPTA_OK;
}

static hepta_status check_tokens(const reporter *w, const int32_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= w->r.base->info.n_vocab) {
            return error_set(w->err, HEPTA_ERROR_ARGUMENT,
                             "the tokenizer gives token %d, the model has %u", (int)tokens[i],
                             w->r.base->info.n_vocab);
        }
    }
    return n > 0 ? HEPTA_OK : error_set(w->err, HEPTA_ERROR_ARGUMENT, "%s: no tokens", w->o.text);
}

/* Encodes the text's first tokens; *bos is -1 where the model expects none. */
static hepta_status read_tokens(reporter *w, int32_t **tokens, size_t *n, int32_t *bos) {
    char *text = NULL;
    size_t n_text = 0, n_bos = 0;
    hepta_tokenizer *t = NULL;
    *bos = -1;
    hepta_status status = read_text(w->o.text, &text, &n_text, w->err);
    if (status == HEPTA_OK) { /* a .hepta file always has one */
        const char *model = w->o.paths[w->r.quantized->info.quantized ? 1 : 0];
        status = hepta_tokenizer_open(model, w->o.tokenizer, &t, w->err);
    }
    if (status == HEPTA_OK) {
        status = hepta_tokenizer_encode(t, "", 0, HEPTA_ENCODE_BOS, bos, 1, &n_bos, w->err);
    }
    if (status == HEPTA_OK) {
        status = encode_text(t, text, n_text, 0, tokens, n, w->err);
    }
    if (status == HEPTA_OK) {
        *n = *n > w->o.limit ? w->o.limit : *n;
        status = check_tokens(w, *tokens, *n);
    }
    if (status == HEPTA_OK && *bos >= 0) {
        status = check_tokens(w, bos, 1);
    }
    hepta_tokenizer_free(t);
    free(text);
    return status;
}

static hepta_status measure_inputs(reporter *w) {
    report_data *r = &w->r;
    int32_t *tokens = NULL, bos;
    size_t n = 0;
    hepta_session *session = NULL;
    uint32_t window = r->base->info.n_ctx_train < WINDOW ? r->base->info.n_ctx_train : WINDOW;
    hepta_session_options options = {.n_ctx = window, .n_batch = window, .threads = w->o.threads};
    hepta_status status = read_tokens(w, &tokens, &n, &bos);
    if (status == HEPTA_OK && window < 2) {
        status = error_set(w->err, HEPTA_ERROR_ARGUMENT, "%s: a context of %u tokens",
                           w->o.paths[0], window);
    }
    if (status == HEPTA_OK) {
        status = allocate_inputs(w);
    }
    if (status == HEPTA_OK) {
        status = hepta_session_create(r->base, &options, &session, w->err);
    }
    if (status == HEPTA_OK) {
        size_t room = window - (bos >= 0 ? 1 : 0);
        r->n_tokens = n;
        w->total *= 1 + (n + room - 1) / room;
        status = run_windows(w, session, bos, tokens, n);
    }
    for (size_t i = 0; i < r->n_inputs; i++) {
        finish_spread(&r->inputs[i]);
        finish_spread(&r->rotated[i]);
    }
    for (size_t i = 0; i < r->n_matrices; i++) {
        report_matrix *m = &r->matrices[i];
        if (m->sum_base > 0) {
            m->output_error = relative(m->sum_output, m->sum_base);
            m->total_error = relative(m->sum_total, m->sum_base);
        }
    }
    hepta_session_free(session);
    free(tokens);
    return status;
}

/* ---- Result ------------------------------------------------------------ */

/* JSON has no NaN and no infinity: null. */
static json_t *number(double x) {
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *json_spread(const spread *s) {
    return s->n == 0 ? json_null()
                     : json_pack("{s:o, s:o, s:o, s:o, s:o}", "min", number(s->min), "max",
                                 number(s->max), "rms", number(s->rms), "kurtosis",
                                 number(s->kurtosis), "peak", number(s->peak));
}

static json_t *json_report(const report_data *r) {
    json_t *tensors = json_array(), *inputs = json_array();
    for (size_t i = 0; i < r->n_matrices; i++) {
        const report_matrix *m = &r->matrices[i];
        json_array_append_new(
            tensors,
            json_pack("{s:o, s:i, s:i, s:s, s:f, s:f, s:o, s:o, s:o}", "name",
                      json_name(matrix_name(m)), "rows", (int)m->base->n_rows, "cols",
                      (int)m->base->n_cols, "type", tensor_type_name(m->quantized->type), "bits",
                      m->bits, "share", m->share, "error", number(m->error), "output_error",
                      number(m->output_error), "output_error_int8", number(m->total_error)));
    }
    for (size_t i = 0; i < r->n_inputs; i++) {
        size_t input = i + 1 == r->n_inputs ? LLAMA_HEAD_IN : i % LAYER_INPUTS;
        json_array_append_new(
            inputs, json_pack("{s:i, s:s, s:o, s:o}", "layer", (int)(i / LAYER_INPUTS), "input",
                              input_names[input], "base", json_spread(&r->inputs[i]), "rotated",
                              json_spread(&r->rotated[i])));
    }
    return json_pack("{s:o, s:o, s:f, s:o, s:I, s:o, s:o}", "base", json_name(r->base_path),
                     "quantized", json_name(r->quantized_path), "bits_per_weight",
                     r->quantized->info.bits_per_weight, "text",
                     r->text_path != NULL ? json_name(r->text_path) : json_null(), "tokens",
                     (json_int_t)r->n_tokens, "tensors", tensors, "inputs", inputs);
}

/* A line for each kind of matrix: means over the layers, weighted by the weights. */
static void print_summary(const report_data *r) {
    printf("%-12s %8s %8s %10s %14s %14s\n", "", "bits", "share", "error", "output error",
           "with int8");
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        double weights = 0, bits = 0, share = 0, error = 0, output = 0, total = 0;
        for (size_t i = 0; i < r->n_matrices; i++) {
            const report_matrix *m = &r->matrices[i];
            double n = m->kind == kind ? (double)m->base->n_rows * m->base->n_cols : 0;
            if (n > 0) {
                weights += n;
                bits += n * m->bits;
                share += m->share;
                error += n * m->error;
                output += n * m->output_error;
                total += n * m->total_error;
            }
        }
        if (weights > 0) {
            printf("%-12s %8.3f %6.2f %% %8.3f %%", kind_names[kind], bits / weights, 100 * share,
                   100 * error / weights);
            if (isfinite(output)) {
                printf(" %12.3f %% %12.3f %%", 100 * output / weights, 100 * total / weights);
            }
            printf("\n");
        }
    }
}

static hepta_status measure(reporter *w) {
    report_data *r = &w->r;
    hepta_status status = hepta_model_open(w->o.paths[0], &r->base, w->err);
    if (status == HEPTA_OK) {
        status = hepta_model_open(w->o.paths[1], &r->quantized, w->err);
    }
    if (status == HEPTA_OK) {
        status = check_pair(w);
    }
    if (status == HEPTA_OK) {
        status = pair_matrices(w);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    w->width = llama_width(r->base);
    measure_sizes(r);
    for (size_t i = 0; i < r->n_matrices; i++) {
        w->total += (uint64_t)r->matrices[i].base->n_rows * r->matrices[i].base->n_cols;
    }
    progress_start(&w->p, "report", "weights");
    w->p.quiet = w->o.quiet;
    if (w->o.text != NULL) {
        status = measure_inputs(w);
    }
    if (status == HEPTA_OK) {
        status = measure_weights(w);
    }
    progress_finish(&w->p);
    return status;
}

static void close_all(reporter *w) {
    free(w->r.matrices);
    free(w->r.inputs);
    free(w->r.rotated);
    free(w->scratch);
    free(w->rotated);
    free(w->quantized);
    free(w->activations);
    hepta_model_close(w->r.base);
    hepta_model_close(w->r.quantized);
}

int cli_report(int argc, char **argv) {
    hepta_error err = {0};
    reporter w = {.o = {.limit = DEFAULT_TOKENS}, .err = &err};
    settings *o = &w.o;
    const option_spec specs[] = {
        {"output", 'o', OPTION_STRING, &o->out, "FILE", "write a page of HTML with plots"},
        {"file", 'f', OPTION_STRING, &o->text, "TEXT",
         "measure inputs and outputs of the layers on this text"},
        {"limit", 0, OPTION_U32, &o->limit, "N", "use the first N tokens of it (default 1024)"},
        {"tokenizer", 0, OPTION_STRING, &o->tokenizer, "FILE",
         "tokenizer, where the models come without one"},
        {"threads", 't', OPTION_INT, &o->threads, "N", "threads (default: physical cores)"},
        {"json", 0, OPTION_FLAG, &o->json, NULL, "print everything as JSON"},
        {"quiet", 'q', OPTION_FLAG, &o->quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "report BASE QUANTIZED [-o REPORT.html] [options]",
        .summary = "Shows what quantizing did to each tensor of a model.",
        .details =
            "BASE is the unquantized model, QUANTIZED what was made of it. Errors are relative:\n"
            "|W' - W| / |W| of the weights, |W' x - W x| / |W x| of the outputs on the base's\n"
            "own inputs x, also with int8 inputs as in the real computation.",
        .example = "hepta report model.gguf model.hepta -f text.txt -o report.html",
        .options = specs,
        .min_arguments = 2,
        .max_arguments = 2,
    };
    int code = options_parse(&spec, argc, argv, o->paths);
    if (code >= 0) {
        return code;
    }
    if (o->text != NULL && o->limit == 0) {
        fprintf(stderr, "hepta: --limit 0: expected 1 or more tokens\n");
        return EXIT_USAGE;
    }
    interrupt_catch();
    w.r.base_path = o->paths[0];
    w.r.quantized_path = o->paths[1];
    w.r.text_path = o->text;
    o->threads = o->threads > 0 ? o->threads : threads_default();
    hepta_status status = measure(&w);
    if (status == HEPTA_OK && o->out != NULL) {
        status = report_write_html(&w.r, o->out, &err);
    }
    if (status != HEPTA_OK) {
        code = report(&err);
    } else if (o->json) {
        code = print_json(json_report(&w.r));
    } else {
        print_summary(&w.r);
        code = EXIT_OK;
    }
    close_all(&w);
    return code;
}
