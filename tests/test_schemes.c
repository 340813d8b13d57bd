/*
 * test_schemes.c - the plain quantizers: their bound on the error, their bits, their files.
 */
#include "bytes.h"
#include "test.h"

#include "format/container.h"
#include "kernels/kernels.h"
#include "quantize/awq.h"
#include "quantize/calibrate.h"

#include <float.h>
#include <math.h>

static const scheme_kind kinds[] = {SCHEME_INT4, SCHEME_INT8, SCHEME_PAIR};

enum { MAX_ROW = 300, N_SHAPES = 14 };

/* Rows of all kinds; `scale` is of the order of their values. */
static void fill_row(float *x, uint32_t n, int shape, float scale) {
    float constant = scale * test_random_float();
    for (uint32_t i = 0; i < n; i++) {
        float u = test_random_float();
        switch (shape) {
        case 0:
            x[i] = scale * 0.25f * test_random_gauss();
            break;
        case 1: /* zeros */
            x[i] = i % 3 == 0 ? -0.0f : 0.0f;
            break;
        case 2:
            x[i] = constant;
            break;
        case 3: /* all positive, far from zero */
            x[i] = scale * (1.0f + 0.001f * u);
            break;
        case 4: /* all negative */
            x[i] = -scale * fabsf(u);
            break;
        case 5: /* one outlier */
            x[i] = i == n / 2 ? scale : scale * 1e-6f * u;
            break;
        case 6: /* every magnitude there is */
            x[i] = scale * ldexpf(u, -(int)test_random_below(150));
            break;
        case 7: /* subnormal */
            x[i] = ldexpf(u, -127);
            break;
        case 8: /* about the smallest steps of binary16 */
            x[i] = ldexpf(u, -22);
            break;
        case 9: /* ties: halves of a step that is exactly representable */
            x[i] = scale * 0x1p-7f * ((float)test_random_below(31) - 15.0f) * 0.5f;
            break;
        case 10: /* ties of a range whose zero point is a tie as well */
            x[i] = 0.5f * ((float)test_random_below(31) - 7.0f);
            break;
        case 11: /* two values */
            x[i] = u < 0 ? -scale : scale * 0.999f;
            break;
        case 12: /* a range whose ends differ by more than binary64 holds */
            x[i] = i == 0 ? -0x1p-149f : scale * fabsf(u);
            break;
        default: /* a single weight that is not zero */
            x[i] = i == n - 1 ? constant : 0.0f;
        }
    }
}

/* Levels of the weight in this column of its group. */
static int levels_of(scheme_kind kind, uint32_t column) {
    return kind == SCHEME_INT8 ? 255 : kind == SCHEME_INT4 || column % 2 == 0 ? 15 : 7;
}

/*
 * The bound, exactly; and what makes it worth something: the values are at most so many multiples
 * of a binary16 step, zero among them, and no step is larger than the range asks for.
 */
static void check_row(const scheme *s, const float *x, uint32_t n, const float *y,
                      const float *step) {
    const uint32_t size = s->group == 0 || s->group > n ? n : s->group;
    const uint32_t stride = s->kind == SCHEME_PAIR ? 2 : 1;
    for (uint32_t first = 0; first < n; first += size) {
        const uint32_t end = n - first < size ? n : first + size;
        for (uint32_t phase = 0; phase < stride && first + phase < end; phase++) {
            const int levels = levels_of(s->kind, phase);
            double lo = 0, hi = 0, least = 0, most = 0;
            const float scale = step[first + phase];
            CHECK(scale == half_to_float(half_from_float(scale)) && scale >= 0.0f);
            for (uint32_t i = first + phase; i < end; i += stride) {
                CHECK(step[i] == scale);
                if (!(fabsl((long double)x[i] - (long double)y[i]) <= (long double)scale / 2)) {
                    test_fail(__FILE__, __LINE__, "weight %a became %a with step %a", (double)x[i],
                              (double)y[i], (double)scale);
                }
                double k = scale > 0.0f ? (double)y[i] / (double)scale : 0.0;
                CHECK(k == rint(k) && (scale > 0.0f || y[i] == 0.0f));
                CHECK(x[i] != 0.0f || y[i] == 0.0f);
                lo = fmin(lo, (double)x[i]), hi = fmax(hi, (double)x[i]);
                least = fmin(least, k), most = fmax(most, k);
            }
            CHECK(most - least <= levels);
            CHECK((double)scale <= (hi - lo) / levels * (1 + 0x1p-10) + 0x1p-24);
        }
    }
}

TEST(schemes_bound) {
    static const uint32_t widths[] = {1, 2, 3, 5, 16, 33, 128, MAX_ROW};
    static const uint32_t groups[] = {0, 1, 2, 7, 32, 128};
    static const float scales[] = {0x1p-24f, 0x1p-14f, 0.02f, 1.0f, 400.0f, 100000.0f};
    long n_rows = 0;
    const int repeats = getenv("HEPTA_FAST") != NULL ? 1 : 8;
    for (size_t k = 0; k < 3; k++) {
        for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++) {
            for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++) {
                for (int i = 0; i < repeats * N_SHAPES * 6; i++, n_rows++) {
                    const scheme s = {kinds[k], groups[g]};
                    float x[MAX_ROW], y[MAX_ROW], step[MAX_ROW];
                    fill_row(x, widths[w], i % N_SHAPES, scales[i / N_SHAPES % 6]);
                    memcpy(y, x, sizeof y);
                    CHECK(scheme_quantize_row(&s, y, widths[w], step));
                    check_row(&s, x, widths[w], y, step);
                }
            }
        }
    }
    test_note("the bound holds on %ld rows", n_rows);
}

/* Half a step is reached: the bound is the best of its kind. */
TEST(schemes_bound_is_tight) {
    const scheme s = {SCHEME_INT4, 0};
    float x[3] = {0.0f, 15.0f, 0.5f}, step[3];
    CHECK(scheme_quantize_row(&s, x, 3, step));
    CHECK(step[0] == 1.0f && x[1] == 15.0f && fabsf(x[2] - 0.5f) == 0.5f);
}

TEST(schemes_too_wide) {
    const scheme s = {SCHEME_INT4, 0};
    float fits[2] = {-65504.0f * 7.0f, 65504.0f * 8.0f},
          wide[2] = {-65504.0f * 8.0f, 65504.0f * 8.0f};
    CHECK(scheme_quantize_row(&s, fits, 2, NULL));
    CHECK(fits[0] == -65504.0f * 7.0f && fits[1] == 65504.0f * 8.0f);
    CHECK(!scheme_quantize_row(&s, wide, 2, NULL));
    float largest[2] = {-FLT_MAX, FLT_MAX};
    CHECK(!scheme_quantize_row(&s, largest, 2, NULL));
}

/* Bits counted weight by weight. */
TEST(schemes_bits) {
    for (size_t k = 0; k < 3; k++) {
        for (uint32_t group = 0; group < 20; group++) {
            for (uint32_t n = 1; n < 70; n++) {
                const scheme s = {kinds[k], group};
                const uint32_t size = group == 0 ? n : group;
                uint64_t expected = 0;
                for (uint32_t i = 0; i < n; i++) {
                    uint32_t column = i % size;
                    int levels = levels_of(kinds[k], column);
                    uint64_t bits = levels == 255 ? 8 : levels == 15 ? 4 : 3;
                    bool first = column == 0 || (kinds[k] == SCHEME_PAIR && column == 1);
                    expected += bits + (first ? 16 + bits : 0);
                }
                CHECK_EQ_INT(scheme_row_bits(&s, n), expected);
            }
        }
    }
    CHECK_EQ_INT(scheme_row_bits(&(scheme){SCHEME_PAIR, 128}, 4096), 32 * (64 * 7 + 20 + 19));
}

#define MODEL "models/hepta-stories-7m-f16.gguf"

/* Every row as awq_quantize_row leaves it, the rest as it was; returns the bits it would take. */
static double check_tensors(const container *in, const container *out, const scheme *s,
                            const awq *a) {
    double bits = 0;
    CHECK_EQ_INT(in->n_tensors, out->n_tensors);
    for (size_t i = 0; i < in->n_tensors; i++) {
        const tensor *t = &in->tensors[i], *u = &out->tensors[i];
        CHECK(u->type == TENSOR_F32 && strcmp(t->name, u->name) == 0);
        CHECK_MEM_EQ(t->ne, u->ne, sizeof t->ne);
        const uint32_t n = (uint32_t)t->ne[0];
        const float *scales = a != NULL ? awq_scales(a, t->name) : NULL;
        CHECK((scales != NULL) ==
              (a != NULL && strncmp(t->name, "blk.", 4) == 0 && t->n_dims == 2));
        float *x = malloc(n * sizeof *x);
        CHECK(x != NULL);
        for (uint64_t r = 0; r < t->ne[1]; r++) {
            kernels_tensor_row(&kernels_ref, t, r, x);
            CHECK(t->n_dims != 2 || (a != NULL ? awq_quantize_row(s, scales, x, n)
                                               : scheme_quantize_row(s, x, n, NULL)));
            CHECK_MEM_EQ(x, u->data + r * n * sizeof *x, n * sizeof *x);
        }
        free(x);
        bits += t->n_dims == 2 ? (double)t->ne[1] * (double)scheme_row_bits(s, n) : 32.0 * n;
    }
    return bits;
}

static void check_file(const char *model, const scheme_options *o, const awq *a, const char *name) {
    const char *path = bytes_path(test_tmp_dir(), "m.gguf");
    hepta_error err;
    double bits = 0, weights = 0;
    float noted = 0;
    container *in, *out;
    hepta_model *m;
    CHECK_OK(scheme_quantize_file(model, path, o, &bits, &err));
    CHECK_OK(container_open(model, NULL, &in, &err));
    CHECK_OK(container_open(path, NULL, &out, &err));
    for (size_t i = 0; i < in->n_tensors; i++) {
        weights += (double)tensor_n_weights(&in->tensors[i]);
    }
    CHECK(bits == check_tensors(in, out, &o->scheme, a) / weights);
    CHECK_OK(container_get_f32(out, "fake_quantization.bits_per_weight", &noted, &err));
    CHECK(noted == (float)bits);
    CHECK_EQ_STR(container_get_string(out, "fake_quantization.scheme"), name);
    container_close(in);
    container_close(out);
    CHECK_OK(hepta_model_open(path, &m, &err));
    hepta_model_close(m);
}

TEST(schemes_file) {
    if (!file_exists(MODEL)) {
        SKIP(MODEL " is absent");
    }
    for (int threads = 1; threads <= 2; threads++) {
        const scheme_options o = {.scheme = {SCHEME_PAIR, 64}, .threads = threads};
        check_file(MODEL, &o, NULL, "pair, groups of 64");
    }
}

/* ---- AWQ --------------------------------------------------------------- */

/* The first layer of the bundled model as a model of its own. */
static void write_layer(const char *path) {
    hepta_error err;
    container *in;
    hepta_writer *w;
    tensor tensors[16];
    size_t n = 0;
    CHECK_OK(container_open(MODEL, NULL, &in, &err));
    for (size_t i = 0; i < in->n_tensors; i++) {
        const char *name = in->tensors[i].name;
        if (strncmp(name, "blk.", 4) != 0 || strncmp(name, "blk.0.", 6) == 0) {
            CHECK(n < 16);
            tensors[n++] = in->tensors[i];
        }
    }
    CHECK_OK(container_set_u32(in, "llama.block_count", 1, &err));
    CHECK_OK(gguf_writer_open(path, in->kvs, in->n_kvs, tensors, n, &w, &err));
    for (size_t i = 0; i < n; i++) {
        CHECK_OK(hepta_writer_write(w, tensors[i].data, (size_t)tensors[i].n_bytes, &err));
    }
    CHECK_OK(hepta_writer_commit(w, &err));
    container_close(in);
}

/* An input of the layer, and what scales cost there, computed from the definition. */
typedef struct observed {
    llama_input input;
    const scheme *scheme;
    const float *scales; /* found by the search */
    const hepta_model *model;
    double found, least; /* costs: of these scales, of the best of the grid */
} observed;

/* |X (W' - W)^T|^2, W' quantized with the scales s */
static double output_error(const observed *o, const matrix *w, const float *x, uint32_t n_tokens,
                           const float *s) {
    double sum = 0;
    float *row = malloc(2 * w->n_cols * sizeof *row), *e = row + w->n_cols;
    CHECK(row != NULL);
    for (uint32_t r = 0; r < w->n_rows; r++) {
        kernels_tensor_row(&kernels_ref, w->source, r, row);
        memcpy(e, row, w->n_cols * sizeof *e);
        CHECK(awq_quantize_row(o->scheme, s, e, w->n_cols));
        for (uint32_t t = 0; t < n_tokens; t++) {
            double y = 0;
            for (uint32_t c = 0; c < w->n_cols; c++) {
                y += (double)x[(size_t)t * w->n_cols + c] * ((double)e[c] - (double)row[c]);
            }
            sum += y * y;
        }
    }
    free(row);
    return sum;
}

static void on_input(void *context, uint32_t layer, llama_input input, const float *x, uint32_t n) {
    observed *o = context;
    if (layer != 0 || input != o->input) {
        return;
    }
    const llama_layer *l = &o->model->layers[layer];
    const matrix *w[3] = {&l->wq, &l->wk, &l->wv};
    const size_t n_w = input == LLAMA_ATTN_IN ? 3 : 1;
    w[0] = input == LLAMA_ATTN_IN ? w[0] : &l->wo;
    const uint32_t width = w[0]->n_cols, head_dim = o->model->info.head_dim;
    float *s = malloc(width * sizeof *s);
    CHECK(s != NULL);
    o->least = (double)INFINITY;
    for (int step = -1; step < 20; step++) {
        float low = INFINITY, high = 0;
        for (uint32_t c = 0; c < width; c++) {
            double mean = 0;
            for (uint32_t t = 0; t < n; t++) {
                const float *row = x + (size_t)t * width;
                /* two query heads share a value head */
                const uint32_t other = input == LLAMA_ATTN_OUT ? c ^ head_dim : c;
                mean += (fabs((double)row[c]) + fabs((double)row[other])) / 2 / n;
            }
            s[c] = (float)pow(mean, step / 20.0);
            low = s[c] < low ? s[c] : low;
            high = s[c] > high ? s[c] : high;
        }
        for (uint32_t c = 0; c < width; c++) {
            s[c] = step < 0 ? o->scales[c] : s[c] / (sqrtf(low) * sqrtf(high));
        }
        double cost = 0;
        for (size_t i = 0; i < n_w; i++) {
            cost += output_error(o, w[i], x, n, s);
        }
        o->found = step < 0 ? cost : o->found;
        o->least = step >= 0 && cost < o->least ? cost : o->least;
    }
    free(s);
}

/* The scales are the best of the grid; those of values are shared; threads change nothing. */
TEST(schemes_awq) {
    if (!file_exists(MODEL)) {
        SKIP(MODEL " is absent");
    }
    static const char text[] =
        "Once upon a time there lived a king in a castle by the sea, and he had three sons.";
    char path[1024], model[1024];
    snprintf(path, sizeof path, "%s/text", test_tmp_dir());
    snprintf(model, sizeof model, "%s/layer.gguf", test_tmp_dir());
    bytes_write_file(path, text, sizeof text - 1);
    write_layer(model);
    scheme_options o = {
        .scheme = {SCHEME_INT4, 32}, .threads = 1, .awq = true, .calibration_path = path};
    hepta_error err;
    awq *a;
    CHECK_OK(awq_search(model, &o, &a, &err));
    o.threads = 2;
    check_file(model, &o, a, "int4, groups of 32, AWQ");

    const float *s = awq_scales(a, "blk.0.attn_output.weight");
    for (uint32_t c = 0; c < 256; c++) {
        CHECK(s[c] == s[c ^ 64]);
    }
    CHECK(awq_scales(a, "blk.0.attn_q.weight") == awq_scales(a, "blk.0.attn_v.weight"));
    CHECK(awq_scales(a, "token_embd.weight") == NULL);
    const calibration_options options = {
        .model = model, .text_path = path, .n_tokens = 16384, .threads = 1};
    calibration *c;
    CHECK_OK(calibration_open(&options, &c, &err));
    static const llama_input inputs[] = {LLAMA_ATTN_IN, LLAMA_ATTN_OUT};
    for (size_t i = 0; i < 2; i++) {
        uint32_t n_tokens;
        hepta_session *session = calibration_session(c, &n_tokens);
        observed seen = {.input = inputs[i], .scheme = &o.scheme, .model = session->model};
        seen.scales = awq_scales(a, i == 0 ? "blk.0.attn_k.weight" : "blk.0.attn_output.weight");
        llama_observe(session, n_tokens, NULL,
                      &(llama_observer){.input = on_input, .context = &seen});
        CHECK(seen.found > 0 && fabs(seen.found - seen.least) < 0.001 * seen.least);
        test_note("input %zu: output error %g, the grid's least %g", i, seen.found, seen.least);
    }
    calibration_free(c);
    awq_free(a);
}
