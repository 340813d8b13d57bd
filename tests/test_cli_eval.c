/*
 * test_cli_eval.c - the commands that measure models: perplexity --kl-from.
 */
#include "command.h"

#define MODEL "models/hepta-stories-7m.hepta"
#define BASE "models/hepta-stories-7m-f16.gguf"
#define TEXT "models/README.md" /* any English text will do */

static const char *python_and_build(void) {
    static char words[512];
    const char *python = getenv("HEPTA_PYTHON"), *build = getenv("HEPTA_BUILD");
    if (python == NULL || build == NULL || *python == '\0') {
        SKIP("HEPTA_PYTHON and HEPTA_BUILD are not set");
    }
    snprintf(words, sizeof words, "%s", python);
    return words;
}

/* All figures against NumPy, from the raw logits. */
TEST(cli_perplexity_kl_matches_numpy) {
    const char *python = python_and_build();
    int code = run("'%s' tests/compare_divergence.py " MODEL " " BASE " " TEXT " --build '%s'",
                   python, getenv("HEPTA_BUILD"));
    if (code == 77 || code == 126 || code == 127) {
        SKIP("%s is missing, or has no numpy", python);
    }
    test_note("%.*s", (int)strcspn(output, "\n"), output);
    CHECK_EQ_INT(code, 0);
}

/* A saved base gives the same figures as the base itself; threads change nothing. */
TEST(cli_perplexity_kl_saved) {
    const char *tmp = test_tmp_dir();
    static const char common[] = "hepta perplexity " MODEL " -f " TEXT " -q --json --limit 300";
    CHECK_RUN(0, "%s --kl-from " BASE " --ctx 96 -t 1 | grep -v gguf >%s/one", common, tmp);
    CHECK_RUN(0, "%s --kl-from " BASE " --ctx 96 -t 3 | grep -v gguf >%s/three", common, tmp);
    CHECK_RUN(0, "cmp %s/one %s/three", tmp, tmp);
    CHECK_RUN(0, "hepta perplexity " BASE " -f " TEXT " -q --limit 300 --ctx 96 --kl-save %s/l",
              tmp);
    CHECK_RUN(0, "%s --kl-from %s/l | grep -v '%s/l' >%s/saved; cmp %s/one %s/saved", common, tmp,
              tmp, tmp, tmp, tmp); /* ctx and stride come from the file */
    CHECK_RUN(0, "hepta perplexity " BASE " -f " TEXT " -q --limit 300 --kl-from %s/l", tmp);
    CHECK_SAYS("ratio 1.00000 +- 0.00000");
    CHECK_SAYS("KL divergence 0.000000 +- 0.000000 nats; median 0.000000");
    CHECK_SAYS("same top token 100.000 +- 0.000 %");
    CHECK_SAYS("RMS change 0.000 +- 0.000 %");
    CHECK_RUN(1, "hepta perplexity " MODEL " -f " TEXT " -q --limit 299 --kl-from %s/l", tmp);
    CHECK_SAYS(
        "holds logits of 300 tokens (vocabulary 4096, ctx 96, stride 48); asked for are 299");
    CHECK_RUN(1, "hepta perplexity " MODEL " -f " TEXT " -q --limit 300 --ctx 90 --kl-from %s/l",
              tmp);
    CHECK_SAYS("ctx 90");
    CHECK_RUN(1, "hepta perplexity " MODEL " -f LICENSE -q --limit 300 --kl-from %s/l", tmp);
    CHECK_RUN(1, "hepta perplexity " MODEL " -f README.md -q --limit 300 --kl-from %s/l", tmp);
    CHECK_SAYS("another text");
    CHECK_RUN(1, "head -c 1000000 %s/l >%s/t; %s --kl-from %s/t", tmp, tmp, common, tmp);
    CHECK_SAYS("1000000 bytes do not hold 300 x 4096 logits");
    CHECK_RUN(1,
              "(printf HEPTALGT; printf '\\002'; head -c 100 /dev/zero) >%s/t; %s --kl-from %s/t",
              tmp, common, tmp);
    CHECK_SAYS("version 2");
    CHECK_RUN(1, "hepta perplexity " MODEL " -f " TEXT " -q --kl-save %s", tmp);
    CHECK_SAYS("is a directory");
}

TEST(cli_perplexity_kl_refuses) {
    char stories[512];
    CHECK_RUN(1, "hepta perplexity " MODEL " -f " TEXT " --kl-from /nonexistent");
    CHECK_SAYS("/nonexistent");
    CHECK_RUN(1, "hepta perplexity " MODEL " -f " TEXT " --kl-from " TEXT);
    snprintf(stories, sizeof stories, "%s", test_need_data("models/stories260K.bin"));
    CHECK_RUN(1, "hepta perplexity " MODEL " -f " TEXT " --kl-from %s", stories);
    CHECK_SAYS("a vocabulary of 4096 tokens");
}
