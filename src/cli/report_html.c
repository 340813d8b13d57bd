/*
 * report_html.c - the page that hepta report writes: HTML, style and SVG plots in one file, nothing
 * loaded from elsewhere, no script. Readable in a light and a dark window.
 */
#include "cli/report.h"

#include "base/base.h"
#include "text/utf8.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Text -------------------------------------------------------------- */

/* Text that came from a file or the command line: escaped, and U+FFFD for what is not UTF-8. */
static void put_text(FILE *f, const char *text) {
    size_t n = strlen(text);
    char *clean = malloc(3 * n + 1);
    n = clean != NULL ? utf8_display(text, n, clean) : 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)clean[i];
        if (strchr("<>&\"'", c) != NULL || c < 0x20 || c == 0x7f) {
            fprintf(f, "&#%d;", c < 0x20 || c == 0x7f ? UTF8_REPLACEMENT : c);
        } else {
            fputc(c, f);
        }
    }
    free(clean);
}

static const char style[] =
    ":root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#667;--line:#d8dce2;--c0:#0072b2;"
    "--c1:#56b4e9;--c2:#009e73;--c3:#d55e00;--c4:#cc79a7;--c5:#b8860b;--c6:#7a3fb0}"
    "@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e3e6ea;--dim:#98a0aa;--line:#"
    "333941;"
    "--c0:#4ba3e3;--c1:#8fd3ff;--c2:#2fce9f;--c3:#ff8c42;--c4:#f0a6cc;--c5:#f0c419;--c6:#b78cf0}}"
    "body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;max-width:1000px;"
    "margin:2em auto;padding:0 1em}h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}"
    "p{max-width:46em}table{border-collapse:collapse;font-size:13px}"
    "th,td{padding:.15em .7em;text-align:right;border-bottom:1px solid var(--line);"
    "font-variant-numeric:tabular-nums}th{position:sticky;top:0;background:var(--bg)}"
    "th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}"
    "svg{display:block;width:100%;height:auto;margin:.5em 0}svg text{fill:var(--fg);font-size:12px}"
    ".dim{fill:var(--dim)}.axis{stroke:var(--line);stroke-width:1}"
    ".s{fill:none;stroke-width:1.8}.pair{stroke-dasharray:5 4}"
    ".s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}"
    ".s4{stroke:var(--c4)}.s5{stroke:var(--c5)}.s6{stroke:var(--c6)}"
    ".f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}.f4{fill:var(--c4)"
    "}"
    ".f5{fill:var(--c5)}.f6{fill:var(--c6)}";

/* ---- Plots ------------------------------------------------------------- */

/* A line: y[i * stride] over x = 0 .. n - 1; NAN leaves a gap. */
typedef struct series {
    const char *name;
    const double *y;
    size_t n, stride;
    int color;   /* 0..6 */
    bool dashed; /* belongs to the series before it */
} series;

typedef struct plot {
    const char *title, *unit; /* "%" */
    const series *series;
    size_t n_series;
    bool logarithmic;
} plot;

enum { WIDTH = 960, HEIGHT = 330, LEFT = 62, RIGHT = 180, TOP = 16, BOTTOM = 40 };

/* 1, 2 or 5 times a power of ten, at least x. */
static double round_step(double x) {
    double power = pow(10, floor(log10(x)));
    double m = x / power;
    return power * (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10);
}

typedef struct axis {
    double low, high, step;
    bool logarithmic;
} axis;

static axis make_axis(const plot *p) {
    double low = INFINITY, high = -INFINITY;
    for (size_t s = 0; s < p->n_series; s++) {
        for (size_t i = 0; i < p->series[s].n; i++) {
            double y = p->series[s].y[i * p->series[s].stride];
            if (isfinite(y) && (!p->logarithmic || y > 0)) {
                low = y < low ? y : low;
                high = y > high ? y : high;
            }
        }
    }
    if (p->logarithmic && low <= high) {
        double a = floor(log10(low)), b = ceil(log10(high));
        return (axis){a, b > a ? b : a + 1, 1, true};
    }
    high = high > 0 && isfinite(high) ? high : 1;
    double step = round_step(high / 5);
    return (axis){0, step * ceil(high / step), step, false};
}

static double y_of(const axis *a, double y) {
    double v = a->logarithmic ? log10(y) : y;
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (v - a->low) / (a->high - a->low));
}

static double x_of(size_t i, size_t n) {
    double inner = WIDTH - LEFT - RIGHT;
    return LEFT + (n > 1 ? inner * (double)i / (double)(n - 1) : inner / 2);
}

static void put_grid(FILE *f, const plot *p, const axis *a, size_t n) {
    for (double v = a->low; v <= a->high + a->step / 2; v += a->step) {
        double value = a->logarithmic ? pow(10, v) : v, y = y_of(a, value);
        fprintf(f, "<path class=axis d='M%d %.1fH%d'/>", (int)LEFT, y, WIDTH - RIGHT);
        fprintf(f, "<text x='%d' y='%.1f' text-anchor='end'>%.6g%s%s</text>", LEFT - 6, y + 4,
                value, p->unit[0] != '\0' ? " " : "", p->unit);
    }
    size_t every = (n + 15) / 16;
    for (size_t i = 0; i < n; i += every) {
        fprintf(f, "<text x='%.1f' y='%d' text-anchor='middle'>%zu</text>", x_of(i, n),
                HEIGHT - BOTTOM + 18, i);
    }
    fprintf(f, "<text class=dim x='%d' y='%d' text-anchor='middle'>layer</text>",
            LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 4);
}

static void put_series(FILE *f, const plot *p, const axis *a, const series *s) {
    bool pen = false;
    fprintf(f, "<path class='s s%d%s' d='", s->color, s->dashed ? " pair" : "");
    for (size_t i = 0; i < s->n; i++) {
        double y = s->y[i * s->stride];
        bool drawn = isfinite(y) && (!a->logarithmic || y > 0);
        if (drawn) {
            fprintf(f, "%c%.1f %.1f", pen ? 'L' : 'M', x_of(i, s->n), y_of(a, y));
        }
        pen = drawn;
    }
    fprintf(f, "'/>");
    for (size_t i = 0; i < s->n; i++) {
        double y = s->y[i * s->stride];
        if (isfinite(y) && (!a->logarithmic || y > 0)) {
            fprintf(f,
                    "<circle class=f%d cx='%.1f' cy='%.1f' r='%s'><title>layer %zu, %s: %.4g%s%s"
                    "</title></circle>",
                    s->color, x_of(i, s->n), y_of(a, y), s->dashed ? "2" : "3", i, s->name, y,
                    p->unit[0] != '\0' ? " " : "", p->unit);
        }
    }
}

static void put_plot(FILE *f, const plot *p) {
    size_t n = 0;
    for (size_t s = 0; s < p->n_series; s++) {
        n = p->series[s].n > n ? p->series[s].n : n;
    }
    axis a = make_axis(p);
    fprintf(f, "<h2>%s</h2><svg viewBox='0 0 %d %d' role='img'><title>%s</title>", p->title,
            (int)WIDTH, (int)HEIGHT, p->title);
    put_grid(f, p, &a, n);
    for (size_t s = 0; s < p->n_series; s++) {
        int y = TOP + 14 + 18 * (int)s;
        put_series(f, p, &a, &p->series[s]);
        fprintf(f, "<path class='s s%d%s' d='M%d %dh22'/><text x='%d' y='%d'>%s</text>",
                p->series[s].color, p->series[s].dashed ? " pair" : "", WIDTH - RIGHT + 14, y - 4,
                WIDTH - RIGHT + 42, y, p->series[s].name);
    }
    fprintf(f, "</svg>\n");
}

/* A value of every layer's matrices, by kind: (n_layer, LAYER_KINDS). */
typedef double (*matrix_value)(const report_matrix *m);

static void plot_matrices(FILE *f, const report_data *r, const char *title, const char *unit,
                          matrix_value value, double *values) {
    const size_t n_layer = r->base->info.n_layer;
    series s[LAYER_KINDS];
    for (size_t i = 0; i < n_layer * LAYER_KINDS; i++) {
        values[i] = value(&r->matrices[i]);
    }
    for (int k = 0; k < LAYER_KINDS; k++) {
        s[k] = (series){kind_names[k], values + k, n_layer, LAYER_KINDS, k, false};
    }
    put_plot(f, &(plot){title, unit, s, LAYER_KINDS, false});
}

static double value_error(const report_matrix *m) {
    return 100 * m->error;
}
static double value_bits(const report_matrix *m) {
    return m->bits;
}
static double value_output(const report_matrix *m) {
    return 100 * m->output_error;
}
static double value_total(const report_matrix *m) {
    return 100 * m->total_error;
}

/* A value of every layer's inputs, before (solid) and after (dashed) rotation. */
typedef double (*spread_value)(const spread *s);

static double value_peak(const spread *s) {
    return s->n > 0 ? s->peak : NAN;
}
static double value_kurtosis(const spread *s) {
    return s->n > 0 ? s->kurtosis : NAN;
}

static void plot_inputs(FILE *f, const report_data *r, const char *title, spread_value value,
                        double *values) {
    static const char *const rotated_names[LAYER_INPUTS] = {
        "attn_q, k, v rotated", "attn_output rotated", "ffn_gate, up rotated", "ffn_down rotated"};
    static const int colors[LAYER_INPUTS] = {0, 3, 4, 6};
    const size_t n_layer = r->base->info.n_layer, n = n_layer * LAYER_INPUTS;
    series s[2 * LAYER_INPUTS];
    for (size_t i = 0; i < n; i++) {
        values[i] = value(&r->inputs[i]);
        values[n + i] = value(&r->rotated[i]);
    }
    for (int k = 0; k < LAYER_INPUTS; k++) {
        s[2 * k] = (series){input_names[k], values + k, n_layer, LAYER_INPUTS, colors[k], false};
        s[2 * k + 1] =
            (series){rotated_names[k], values + n + k, n_layer, LAYER_INPUTS, colors[k], true};
    }
    put_plot(f, &(plot){title, "", s, 2 * LAYER_INPUTS, true});
}

/* Bars: the share of each kind in the bytes of all tensors. */
static void put_shares(FILE *f, const report_data *r) {
    double shares[KINDS + 1] = {0}, rest = 1, most = 0;
    for (size_t i = 0; i < r->n_matrices; i++) {
        shares[r->matrices[i].kind] += r->matrices[i].share;
        rest -= r->matrices[i].share;
    }
    shares[KINDS] = rest > 1e-9 ? rest : 0;
    for (int k = 0; k <= KINDS; k++) {
        most = shares[k] > most ? shares[k] : most;
    }
    int rows = 0;
    for (int k = 0; k <= KINDS; k++) {
        rows += shares[k] > 0;
    }
    fprintf(f, "<h2>Share of the tensors&#8217; bytes</h2><svg viewBox='0 0 %d %d' role='img'>",
            (int)WIDTH, 24 * rows);
    for (int k = 0, y = 0; k <= KINDS; k++) {
        if (shares[k] > 0) {
            char color[4] = "dim";
            double w = shares[k] / most * (WIDTH - 300);
            if (k < LAYER_KINDS) {
                snprintf(color, sizeof color, "f%d", k);
            }
            fprintf(f,
                    "<text x='110' y='%d' text-anchor='end'>%s</text><rect class=%s x='120' y='%d' "
                    "width='%.1f' height='16'/><text x='%.1f' y='%d'>%.2f %%</text>",
                    y + 14, k < KINDS ? kind_names[k] : "norms, other", color, y + 2, w > 1 ? w : 1,
                    128 + w, y + 14, 100 * shares[k]);
            y += 24;
        }
    }
    fprintf(f, "</svg>\n");
}

/* ---- Tables ------------------------------------------------------------ */

static void put_percent(FILE *f, double x) {
    if (isfinite(x)) {
        fprintf(f, "<td>%.3f %%</td>", 100 * x);
    } else {
        fprintf(f, "<td>%s</td>", isnan(x) ? "" : "&#8734;");
    }
}

static void put_matrices(FILE *f, const report_data *r) {
    bool outputs = r->n_inputs > 0;
    fprintf(f,
            "<h2>Tensors</h2><div class=wide><table><tr><th>name<th>rows<th>columns<th>type<th>"
            "bits<th>share<th>error%s</tr>\n",
            outputs ? "<th>output error<th>with int8" : "");
    for (size_t i = 0; i < r->n_matrices; i++) {
        const report_matrix *m = &r->matrices[i];
        fputs("<tr><td>", f);
        put_text(f, matrix_name(m));
        fprintf(f, "</td><td>%u</td><td>%u</td><td>%s</td><td>%.3f</td>", m->base->n_rows,
                m->base->n_cols, tensor_type_name(m->quantized->type), m->bits);
        put_percent(f, m->share);
        put_percent(f, m->error);
        if (outputs) {
            put_percent(f, m->output_error);
            put_percent(f, m->total_error);
        }
        fputs("</tr>\n", f);
    }
    fputs("</table></div>\n", f);
}

static void put_spread(FILE *f, const spread *s) {
    if (s->n == 0) {
        fputs("<td><td><td><td><td>", f);
        return;
    }
    fprintf(f, "<td>%.4g</td><td>%.4g</td><td>%.4g</td><td>%.4g</td><td>%.4g</td>", s->min, s->max,
            s->rms, s->kurtosis, s->peak);
}

static void put_inputs(FILE *f, const report_data *r) {
    fputs("<h2>Inputs of the linear layers</h2><div class=wide><table><tr><th>layer<th>input "
          "of<th>min"
          "<th>max<th>RMS<th>kurtosis<th>peak<th>rotated: "
          "min<th>max<th>RMS<th>kurtosis<th>peak</tr>\n",
          f);
    for (size_t i = 0; i < r->n_inputs; i++) {
        bool head = i + 1 == r->n_inputs;
        fputs("<tr><td>", f);
        if (!head) {
            fprintf(f, "%zu", i / LAYER_INPUTS);
        }
        fprintf(f, "</td><td>%s</td>", input_names[head ? LLAMA_HEAD_IN : i % LAYER_INPUTS]);
        put_spread(f, &r->inputs[i]);
        put_spread(f, &r->rotated[i]);
        fputs("</tr>\n", f);
    }
    fputs("</table></div>\n", f);
}

/* ---- The page ---------------------------------------------------------- */

static void put_head(FILE *f, const report_data *r) {
    fprintf(f,
            "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
            "content='width=device-width'><title>hepta report</title><style>%s</style></head><body>"
            "<h1>",
            style);
    put_text(f, r->quantized_path);
    fputs("</h1><p>compared with ", f);
    put_text(f, r->base_path);
    fprintf(f, "<br>%.3f bits per weight, %" PRIu64 " weights, %u layers of width %u, Hepta %s</p>",
            r->quantized->info.bits_per_weight, r->quantized->info.n_weights, r->base->info.n_layer,
            r->base->info.n_embd, hepta_version());
    fputs(
        "<p>Errors are relative. Of a tensor: |W&#8242; &#8722; W| / |W|, W&#8242; the weights as "
        "quantized, rotation undone.",
        f);
    if (r->n_inputs > 0) {
        fprintf(
            f,
            " Of its output: |W&#8242;x &#8722; Wx| / |Wx| over the inputs x that it has in the "
            "unquantized model on %zu tokens of ",
            r->n_tokens);
        put_text(f, r->text_path);
        fputs(" (each tensor by itself; errors are not carried from layer to layer); &#8220;with "
              "int8&#8221; also rounds x as the integer kernels do.",
              f);
    }
    fputs("</p>\n", f);
}

static void put_page(FILE *f, const report_data *r, double *values) {
    put_head(f, r);
    plot_matrices(f, r, "Error of the weights", "%", value_error, values);
    plot_matrices(f, r, "Bits per weight, scales included", "", value_bits, values);
    put_shares(f, r);
    if (r->n_inputs > 0) {
        plot_matrices(f, r, "Error of the output, from the weights alone", "%", value_output,
                      values);
        plot_matrices(f, r, "Error of the output, with int8 inputs", "%", value_total, values);
        plot_inputs(f, r, "Peak of the inputs: largest |x| of a token over its RMS, mean",
                    value_peak, values);
        plot_inputs(f, r, "Kurtosis of the inputs (3: Gaussian)", value_kurtosis, values);
    }
    put_matrices(f, r);
    if (r->n_inputs > 0) {
        put_inputs(f, r);
    }
    fputs("</body></html>\n", f);
}

hepta_status report_write_html(const report_data *r, const char *path, hepta_error *err) {
    char *text = NULL;
    size_t n = 0;
    file_writer *out = NULL;
    double *values = malloc((size_t)r->base->info.n_layer * 8 * sizeof *values);
    FILE *f = open_memstream(&text, &n);
    bool good = values != NULL && f != NULL;
    if (good) {
        put_page(f, r, values);
    }
    if (f != NULL) {
        good = fclose(f) == 0 && good;
    }
    hepta_status status = HEPTA_OK;
    if (!good) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "out of memory for the page %s", path);
    }
    if (status == HEPTA_OK) {
        status = file_writer_open(path, &out, err);
    }
    if (status == HEPTA_OK) {
        status = file_writer_write(out, text, n, err);
        if (status == HEPTA_OK) {
            status = file_writer_commit(out, err);
        } else {
            file_writer_discard(out);
        }
    }
    free(values);
    free(text);
    return status;
}
