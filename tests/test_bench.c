/*
 * test_bench.c - hepta bench: what it prints has the documented form. Nothing here depends on
 * how fast the machine is.
 */
#include "command.h"

#include <jansson.h>
#include <math.h>
#include <unistd.h>

static char model[600];

/* A model of random weights in a directory of its own. */
static void need_model(void) {
    snprintf(model, sizeof model, "%s/m.hepta", test_tmp_dir());
    CHECK_RUN(0,
              "hepta synth --shape vocab=300,width=128,layers=2,heads=4,ff=192,context=64 -b 4 -q "
              "-o %s",
              model);
}

/* The result with this test and size; fails when it is absent or makes no sense. */
static void check_result(const json_t *results, const char *test, int size, const char *unit,
                         int runs) {
    size_t i;
    json_t *item;
    json_array_foreach((json_t *)(uintptr_t)results, i, item) {
        if (strcmp(json_string_value(json_object_get(item, "test")), test) == 0 &&
            json_integer_value(json_object_get(item, "size")) == size) {
            double median = json_real_value(json_object_get(item, "median"));
            CHECK_EQ_STR(json_string_value(json_object_get(item, "unit")), unit);
            CHECK_EQ_INT(json_integer_value(json_object_get(item, "runs")), runs);
            CHECK(median > 0);
            CHECK(json_real_value(json_object_get(item, "min")) <= median);
            CHECK(json_real_value(json_object_get(item, "max")) >= median);
            return;
        }
    }
    test_fail(__FILE__, __LINE__, "no result \"%s\" of size %d", test, size);
}

TEST(bench_model_json) {
    need_model();
    CHECK_RUN(0, "hepta bench %s -p 40 -n 5 --runs 3 --batch 1,3 --threads 2 --busy 1 --json",
              model);
    json_t *root = json_loads(output, 0, NULL);
    CHECK(json_is_object(root));
    CHECK_EQ_STR(json_string_value(json_object_get(root, "model")), model);
    CHECK_EQ_INT(json_integer_value(json_object_get(root, "threads")), 2);
    CHECK_EQ_STR(json_string_value(json_object_get(root, "cache")), "f32");
    CHECK(json_string_value(json_object_get(root, "kernels")) != NULL);
    CHECK(json_string_value(json_object_get(root, "cpu")) != NULL);
    const json_t *results = json_object_get(root, "results");
    check_result(results, "open", 0, "ms", 1);
    check_result(results, "session", 0, "ms", 1);
    check_result(results, "first_pass", 1, "ms", 1);
    check_result(results, "first_token", 32, "ms", 3);
    check_result(results, "prompt", 40, "tokens/s", 3);
    check_result(results, "generation", 5, "tokens/s", 3);
    check_result(results, "prompt_busy", 40, "tokens/s", 3);
    check_result(results, "generation_busy", 5, "tokens/s", 3);
    check_result(results, "batch", 1, "tokens/s", 3);
    check_result(results, "batch", 3, "tokens/s", 3);
    check_result(results, "memory_peak", 0, "MB", 1);
    check_result(results, "read_bandwidth", 1, "GB/s", 7);
    check_result(results, "read_bandwidth", 2, "GB/s", 7);
    check_result(results, "weights_read", 1, "MB", 1);
    check_result(results, "bandwidth_used", 0, "%", 1);
    json_decref(root);
}

/* What a token reads is a property of the file: checked against its tensors. */
TEST(bench_model_bytes_per_token) {
    need_model();
    CHECK_RUN(0, "hepta inspect %s --json", model);
    json_t *root = json_loads(output, 0, NULL), *tensor;
    double bytes = 0;
    size_t i;
    CHECK(root != NULL);
    json_array_foreach(json_object_get(root, "tensors"), i, tensor) {
        double n = (double)json_integer_value(json_object_get(tensor, "bytes"));
        bool embedding =
            strcmp(json_string_value(json_object_get(tensor, "name")), "token_embd.weight") == 0;
        bytes += embedding ? n / 300 : n;
    }
    json_decref(root);
    CHECK_RUN(0, "hepta bench %s -p 0 -n 7 --runs 1 --batch 0 --cache f16 --json", model);
    root = json_loads(output, 0, NULL);
    CHECK(root != NULL);
    int found = 0;
    json_array_foreach(json_object_get(root, "results"), i, tensor) {
        double value = json_real_value(json_object_get(tensor, "median"));
        const char *test = json_string_value(json_object_get(tensor, "test"));
        if (strcmp(test, "weights_read") == 0) {
            CHECK(value > bytes * 0.999999e-6 && value < bytes * 1.000001e-6);
            found++;
        }
        if (strcmp(test, "cache_read") == 0) { /* 2 layers, 128 keys and values, 4 positions */
            CHECK(value > 4095.9e-6 && value < 4096.1e-6);
            found++;
        }
        CHECK(strcmp(test, "prompt") != 0 && strcmp(test, "batch") != 0);
    }
    CHECK_EQ_INT(found, 2);
    json_decref(root);
}

TEST(bench_model_csv) {
    need_model();
    CHECK_RUN(0, "hepta bench %s -p 3 -n 2 --runs 2 --batch 2 --cold --csv", model);
    static const char header[] =
        "model,kernels,threads,cache,test,size,unit,median,min,max,runs,cpu\n";
    CHECK(strncmp(output, header, strlen(header)) == 0);
    int lines = 0;
    for (char *line = output, *end; (end = strchr(line, '\n')) != NULL; line = end + 1, lines++) {
        int commas = 0;
        bool quoted = false;
        for (const char *c = line; c < end; c++) {
            quoted ^= *c == '"';
            commas += *c == ',' && !quoted;
        }
        CHECK_EQ_INT(commas, 11);
    }
    CHECK(lines > 10);
    CHECK_SAYS(",generation,2,tokens/s,");
    CHECK_SAYS(",batch,2,tokens/s,");
}

TEST(bench_model_table) {
    need_model();
    CHECK_RUN(0, "hepta bench %s -p 3 -n 2 --runs 1 --batch 2 --busy 1", model);
    CHECK_SAYS("generation_busy");
    CHECK_SAYS("1 busy neighbour, each in its own session");
}

TEST(bench_model_refuses) {
    need_model();
    CHECK_RUN(1, "hepta bench /nonexistent");
    CHECK_SAYS("/nonexistent");
    CHECK_RUN(1, "hepta bench %s -p 65 -n 0 --batch 0 --runs 1 --busy 65", model);
    CHECK_SAYS("at most 64");
    static const char *const bad[] = {"--json --csv", "--cache q4",  "--runs 0",  "--runs 65",
                                      "--batch 1,",   "--batch 0,1", "--batch x", "--batch -1",
                                      "--batch 4097", "-p 99999999", "-p x",      "other"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_RUN(2, "hepta bench %s %s", model, bad[i]);
    }
    CHECK_RUN(0,
              "hepta synth --shape vocab=300,width=1024,layers=6,heads=8,ff=4096,context=512 -q "
              "-o %s",
              model);
    CHECK_RUN(0,
              "${HEPTA_BUILD:-build}/hepta bench %s --runs 64 --busy 1 & pid=$!; sleep 1; "
              "kill -TERM $pid; wait $pid; test $? = 130",
              model);
    CHECK_SAYS("interrupted");
}

/* Every method is there, and its result is as near to the exact one as its bits allow. */
TEST(bench_kernels_json) {
    CHECK_RUN(
        0,
        "hepta bench kernels --cols 1024 --rows 64 --runs 1 --milliseconds 1 --megabytes 4 --json");
    json_t *root = json_loads(output, 0, NULL), *item;
    CHECK(root != NULL);
    CHECK_EQ_INT(json_integer_value(json_object_get(root, "rows")), 64);
    CHECK(json_real_value(json_object_get(root, "read_bandwidth_1")) > 0);
    static const struct {
        const char *method;
        double rmse; /* of Gaussian weights and int8 activations, about */
    } expected[] = {{"FP32 loop", 1e-6},
                    {"INT4, scale per 32", 0.085},
                    {"INT8, scale per row", 0.012},
                    {"Hepta 4", 0.068},
                    {"Hepta 3.5", 0.095},
                    {"Hepta 3", 0.133},
                    {"Hepta 2.5", 0.187},
                    {"Hepta 2", 0.262}};
    for (size_t e = 0; e < sizeof expected / sizeof expected[0]; e++) {
        size_t i;
        int found = 0;
        json_array_foreach(json_object_get(root, "methods"), i, item) {
            if (strcmp(json_string_value(json_object_get(item, "method")), expected[e].method) ==
                0) {
                double rmse = json_real_value(json_object_get(item, "rmse"));
                CHECK(rmse < 1.5 * expected[e].rmse); /* 64 rows: a sixth of spread */
                CHECK(e == 0 || rmse > 0.67 * expected[e].rmse);
                CHECK(json_real_value(json_object_get(item, "memory_gweights_all")) > 0);
                CHECK(json_real_value(json_object_get(item, "bandwidth_share_all")) > 0);
                found++;
            }
        }
        CHECK(found > 0);
    }
    size_t i, k;
    json_t *speed;
    json_array_foreach(json_object_get(root, "batches"), i, item) {
        CHECK_EQ_INT(json_array_size(json_object_get(item, "speeds")), 8);
        json_array_foreach(json_object_get(item, "speeds"), k, speed) {
            CHECK(json_real_value(json_object_get(speed, "gproducts")) > 0);
        }
    }
    CHECK(i >= 2);
    json_decref(root);
}

/* Rows of a model, rotated, cost what Gaussian ones do. */
TEST(bench_code_of_a_model) {
    char original[600];
    snprintf(original, sizeof original, "%s/m.gguf", test_tmp_dir());
    CHECK_RUN(
        0,
        "hepta synth --shape vocab=259,width=128,layers=1,heads=4,ff=192,context=64 --type f16 "
        "-q -o %s",
        original);
    CHECK_RUN(0, "hepta bench code %s --weights 16384 --json", original);
    json_t *root = json_loads(output, 0, NULL);
    CHECK(root != NULL);
    CHECK_EQ_STR(json_string_value(json_object_get(root, "model")), original);
    const json_t *rates = json_object_get(root, "rates");
    CHECK_EQ_INT(json_array_size(rates), 5);
    for (size_t i = 0; i < 5; i++) {
        const json_t *rate = json_array_get(rates, i);
        const double bits = json_real_value(json_object_get(rate, "bits")),
                     rmse = json_real_value(json_object_get(rate, "rmse")),
                     gauss = json_real_value(json_object_get(rate, "gaussian_rmse"));
        CHECK(bits == 2 + 0.5 * (double)i && gauss > exp2(-bits) && gauss < 1.2 * exp2(-bits));
        CHECK(rmse < 1.03 * gauss && rmse > 0.97 * gauss);
    }
    json_decref(root);
    CHECK_RUN(1, "hepta bench code models/hepta-stories-7m.hepta");
    CHECK_SAYS("expected the original weights of a model");
    CHECK_RUN(0, "hepta bench code %s --weights 1", original);
    CHECK_SAYS("Gaussian rows %");
}

TEST(bench_kernels_table_and_refusals) {
    CHECK_RUN(0, "hepta bench kernels --cols 32 --rows 5 --runs 1 --milliseconds 1 --megabytes 1 "
                 "--threads 3");
    CHECK_SAYS("INT4, scale per 32");
    CHECK_SAYS("tokens at once");
    static const char *const bad[] = {"--cols 33", "--cols 0",         "--rows 0", "--cols 65568",
                                      "--runs 0",  "--milliseconds 0", "x",        "--threads x"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_RUN(2, "hepta bench kernels %s", bad[i]);
    }
}

/* bench/compare against a llama-bench of known speed. */
TEST(bench_compare_table) {
    const char *dir = test_tmp_dir();
    if (access("bench/compare", X_OK) != 0 || system("python3 -c 0 2>/dev/null") != 0) {
        SKIP("bench/compare or python3 is absent");
    }
    CHECK_RUN(0,
              "cat >%s/peer <<'END' && chmod +x %s/peer\n#!/bin/sh\n"
              "echo '[{\"n_prompt\":8,\"n_gen\":0,\"avg_ts\":0.5},"
              "{\"n_prompt\":0,\"n_gen\":4,\"avg_ts\":0.25}]'\nEND\n",
              dir, dir);
    CHECK_RUN(0,
              "python3 bench/compare --hepta ${HEPTA_BUILD:-build}/hepta --shapes stories-7m -p 8 "
              "-n 4 --rounds 2 -t 1 --no-python --peer slow=%s/peer -o %s/table.md && "
              "cat %s/table.md",
              dir, dir, dir);
    CHECK_SAYS("| stories-7m | Hepta | hepta | 3.50 |");
    CHECK_SAYS("| stories-7m | slow | f16 | 16.01 | 0.50 (0.50 to 0.50) | 0.25 (0.25 to 0.25) |");
    CHECK_SAYS("first token after a prompt of 32 | under 50 ms |");
    CHECK_RUN(1, "python3 bench/compare --hepta %s/none --no-python", dir);
    CHECK_SAYS("no such program");
    CHECK_RUN(1, "python3 bench/compare --hepta ${HEPTA_BUILD:-build}/hepta --peer nothing");
    CHECK_SAYS("expected NAME=PATH");
    CHECK_RUN(1, "python3 bench/compare --hepta ${HEPTA_BUILD:-build}/hepta --no-python");
    CHECK_SAYS("scripts/deps bench");
}
