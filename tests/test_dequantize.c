/*
 * test_dequantize.c - the block types of GGUF files: values, and files that hold them.
 */
#include "bytes.h"
#include "test.h"

#include "format/container.h"

#include <math.h>
#include <sys/wait.h>

static uint64_t next(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static uint64_t block_bytes(uint32_t type, uint64_t *items) {
    for (*items = 32; *items <= 256; *items += 224) {
        uint64_t n_bytes;
        if (tensor_type_bytes(type, (const uint64_t[4]){*items, 1, 1, 1}, &n_bytes)) {
            return n_bytes;
        }
    }
    test_fail(__FILE__, __LINE__, "type %u has no blocks", type);
}

/*
 * Digests of what gguf.quants.dequantize (gguf 0.19.0) makes of the same bytes:
 * tests/compare_dequantize.py golden
 */
TEST(dequantize_golden) {
    enum { BLOCKS = 512 };
    static const struct {
        uint32_t type;
        int scales[2]; /* places of binary16 numbers */
        const char *sha256;
    } cases[] = {
        {TENSOR_Q4_0, {0}, "a5c52b6ba20aefd6563679c59ccc63011790aa67850e452eae650ba3cab75eda"},
        {TENSOR_Q4_1, {0, 2}, "88d804e6d9df7c6e488d00dcb8939006e8e1fb473a5733e373b95e290633f2f8"},
        {TENSOR_Q5_0, {0}, "4657836b392e54b9d49953bfe1e2ff45b795d2c11e02eb5ccf9dc3948f68d342"},
        {TENSOR_Q5_1, {0, 2}, "92271f5476c4d48b032422a510f058342b4aaa969486b4b3b25e53607655ca6d"},
        {TENSOR_Q2_K, {80, 82}, "49ab1be8b6396f2d91e0d9ce308d216223b569ab8f22bd579cd6a7577353b282"},
        {TENSOR_Q3_K, {108}, "2b17898937e7b2d6a6d39eb42620655e41311ab0753c2bdd7e531180ef32a6e1"},
        {TENSOR_Q4_K, {0, 2}, "c7fa45981cb196580941c99902c02ec586214d1c1f94f70adb81b7b98a8b623f"},
        {TENSOR_Q5_K, {0, 2}, "e621130171389926a2707970f7bde3b4f51075591ce7257b359d6f7133ea6a5b"},
        {TENSOR_Q6_K, {208}, "7f5946725e73fac61b56eb2e1bfd527782a08cffba378df64656adca35e4c955"},
        {TENSOR_IQ4_NL, {0}, "86a2c8c5490b75a57c2e40519ff61aca60b7aac7a4c3e6fed4dddf409383658a"},
        {TENSOR_IQ4_XS, {0}, "02e4e40db7e910b641a86a54a212e7b9e3459998b4689be75987fe47920657ae"},
    };
    static uint8_t src[BLOCKS * 256];
    static float y[BLOCKS * 256];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t items, size = block_bytes(cases[i].type, &items), state = 7;
        for (size_t j = 0; j < BLOCKS * size; j++) {
            src[j] = (uint8_t)next(&state);
        }
        for (size_t j = 0; j < BLOCKS; j++) {
            for (int k = 0; k < 2; k++) { /* finite; a second place of 0 repeats or is the first */
                src[j * size + (size_t)cases[i].scales[k > 0 && cases[i].scales[1] > 0] + 1] &=
                    0xbf;
            }
        }
        CHECK(tensor_type_is_blocks(cases[i].type) && tensor_type_is_readable(cases[i].type));
        tensor_blocks_to_f32(cases[i].type, src, BLOCKS * items, y);
        sha256 s;
        uint8_t digest[32];
        char hex[65];
        sha256_start(&s);
        sha256_update(&s, y, BLOCKS * items * sizeof y[0]);
        sha256_finish(&s, digest);
        sha256_hex(digest, hex);
        if (strcmp(hex, cases[i].sha256) != 0) {
            test_fail(__FILE__, __LINE__, "%s: the values' SHA-256 is %s",
                      tensor_type_name(cases[i].type), hex);
        }
    }
}

/* A GGUF file with the tensor w of this type: blocks of 0x33 bytes, with a scale at `at`. */
static void write_blocks(const char *path, uint32_t type, size_t at, uint16_t scale) {
    uint64_t items, size = block_bytes(type, &items);
    bytes b = {NULL, 0, 0};
    bytes_put_text(&b, "GGUF");
    bytes_put_int(&b, 3, 4);
    bytes_put_int(&b, 1, 8);
    bytes_put_int(&b, 0, 8);
    bytes_put_string(&b, "w");
    bytes_put_int(&b, 2, 4);
    bytes_put_int(&b, items, 8);
    bytes_put_int(&b, 3, 8);
    bytes_put_int(&b, type, 4);
    bytes_put_int(&b, 0, 8);
    bytes_pad(&b, 32);
    for (uint64_t i = 0; i < 3 * size; i++) {
        bytes_put_int(&b, 0x33, 1);
    }
    memcpy(b.data + b.n - size + at, &scale, 2); /* of the last block */
    bytes_write_file(path, b.data, b.n);
    bytes_free(&b);
}

TEST(dequantize_verify_names_bad_scales) {
    static const struct {
        uint32_t type;
        size_t at;
    } cases[] = {{TENSOR_Q4_0, 0},   {TENSOR_Q4_1, 2},   {TENSOR_Q5_0, 0},  {TENSOR_Q5_1, 2},
                 {TENSOR_Q2_K, 82},  {TENSOR_Q3_K, 108}, {TENSOR_Q4_K, 2},  {TENSOR_Q5_K, 0},
                 {TENSOR_Q6_K, 208}, {TENSOR_IQ4_NL, 0}, {TENSOR_IQ4_XS, 0}};
    const char *path = bytes_path(test_tmp_dir(), "m.gguf");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int bad = 0; bad < 2; bad++) {
            hepta_error err;
            container *c;
            write_blocks(path, cases[i].type, cases[i].at, bad ? 0x7c00 : 0x3c00);
            CHECK_OK(container_open(path, NULL, &c, &err));
            hepta_status status = container_verify(c, NULL, NULL, &err);
            CHECK_EQ_INT(status, bad ? HEPTA_ERROR_FORMAT : HEPTA_OK);
            CHECK(!bad || strstr(err.message, "block 2") != NULL);
            container_close(c);
        }
    }
}

/* tests/compare_dequantize.py: against published implementations, bit by bit */
static void compare(const char *what) {
    const char *python = getenv("HEPTA_PYTHON"), *build = getenv("HEPTA_BUILD");
    if (python == NULL || build == NULL || *python == '\0') {
        SKIP("HEPTA_PYTHON and HEPTA_BUILD are not set");
    }
    char command[4096];
    snprintf(command, sizeof command, "'%s' tests/compare_dequantize.py %s --build '%s'", python,
             what, build);
    fflush(stdout);
    int status = system(command);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    if (code == 77 || code == 126 || code == 127) {
        SKIP("%s is missing, or lacks a package to compare with", python);
    }
    CHECK_EQ_INT(code, 0);
}

TEST(dequantize_like_gguf) {
    compare("gguf");
}

TEST(dequantize_like_autogptq) {
    compare("gptq");
}

TEST(dequantize_like_autoawq) {
    compare("awq");
}
