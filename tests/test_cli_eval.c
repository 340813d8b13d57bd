/*
 * test_cli_eval.c - the commands that measure models: perplexity --kl-from, eval, report.
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

/* The decoder in PyTorch and fine-tuning: integers, scales and weights bit by bit, gradients,
 * files. */
TEST(finetune_matches_engine) {
    const char *python = python_and_build();
    int code =
        run("'%s' tests/compare_finetune.py " MODEL " --build '%s'", python, getenv("HEPTA_BUILD"));
    if (code == 77 || code == 126 || code == 127) {
        SKIP("%s is missing, or has no numpy or torch", python);
    }
    CHECK_EQ_INT(code, 0);
    test_note("%.*s", (int)strcspn(output, "\n"), output);
}

/* ---- eval -------------------------------------------------------------- */

/* Prompts, log-likelihoods and accuracies against Python. */
TEST(cli_eval_matches_numpy) {
    const char *python = python_and_build();
    int code =
        run("'%s' tests/compare_eval.py " MODEL " --build '%s'", python, getenv("HEPTA_BUILD"));
    if (code == 77 || code == 126 || code == 127) {
        SKIP("%s is missing, or has no numpy", python);
    }
    CHECK_EQ_INT(code, 0);
    test_note("%.*s", (int)strcspn(output, "\n"), output);
}

TEST(cli_eval_usage) {
    CHECK_RUN(0, "hepta eval --help");
    CHECK_SAYS("hellaswag");
    CHECK_RUN(2, "hepta eval");
    CHECK_RUN(2, "hepta eval nonsense");
    static const char *const tasks[] = {"mmlu", "hellaswag", "humaneval"};
    for (size_t i = 0; i < 3; i++) {
        CHECK_RUN(0, "hepta eval %s --help", tasks[i]);
        CHECK_SAYS("Example");
        CHECK_RUN(2, "hepta eval %s", tasks[i]);
        CHECK_RUN(1, "hepta eval %s /nonexistent_test.csv", tasks[i]);
        CHECK_SAYS("/nonexistent");
    }
    CHECK_RUN(2, "hepta eval humaneval x --samples 0");
}

/* Writes FOLDER/s_test.csv and prints its first prompt without examples. */
#define CHECK_CSV(code, tmp, text)                                                                 \
    CHECK_RUN(code,                                                                                \
              "printf '%s' >%s/s_test.csv; hepta eval mmlu %s/s_test.csv --shots 0 --show 1",      \
              text, tmp, tmp)

TEST(cli_eval_csv) {
    const char *tmp = test_tmp_dir();
    CHECK_CSV(0, tmp, "\\357\\273\\277\"a \"\"b\"\",\\r\\nc\",x \"y\",,\"\",4,D");
    CHECK_EQ_STR(output, "The following are multiple choice questions (with answers) about  s.\n\n"
                         "a \"b\",\r\nc\nA. x \"y\"\nB. \nC. \nD. 4\nAnswer:");
    CHECK_CSV(0, tmp, "\\n\\r\\nq,1,2,3,4,A\\r\\n\\n");
    CHECK_CSV(1, tmp, "q,1,2,3,4,A\\n\"q,1\\n2,3,4,A\\n");
    CHECK_SAYS("s_test.csv, line 4: a quoted field has no end");
    CHECK_CSV(1, tmp, "q,\"1\"x,2,3,4,A\\n");
    CHECK_SAYS("line 1: text behind a closing quote");
    CHECK_CSV(1, tmp, "\"q\\n\",1,2,3,4,A\\nq,1,2,3,A\\n");
    CHECK_SAYS("line 3: 5 fields");
    CHECK_CSV(1, tmp, "q,1,2,3,4,E\\n");
    CHECK_CSV(1, tmp, "q,1,2,3,4,AB\\n");
    CHECK_SAYS("the last one \"AB\"");
    CHECK_CSV(1, tmp, "q,1,2\\000,3,4,A\\n");
    CHECK_SAYS("byte 5 is NUL");
    CHECK_CSV(1, tmp, "");
    CHECK_SAYS("there are 0 questions");
    CHECK_RUN(1, "hepta eval mmlu %s/s_test.csv --shots 0 -q", tmp);
    CHECK_SAYS("no questions");
    CHECK_RUN(1, "printf 'q,1,2,3,4,A' >%s/s_test.csv; hepta eval mmlu %s --shots 1", tmp, tmp);
    CHECK_SAYS("s_dev.csv");
    CHECK_RUN(1, "cp %s/s_test.csv %s/s_dev.csv; hepta eval mmlu %s --shots 2", tmp, tmp, tmp);
    CHECK_SAYS("1 examples, 2 are asked for");
    CHECK_RUN(0, "hepta eval mmlu %s --shots 1 -q", tmp);
    CHECK_SAYS("(1 questions, 1 examples each)");
    CHECK_RUN(1, "hepta eval mmlu %s --shots 1 --ctx 1 -q", tmp);
    CHECK_SAYS("too short");
    CHECK_RUN(1, "rm %s/*; hepta eval mmlu %s", tmp, tmp);
    CHECK_SAYS("no files NAME_test.csv");
}

#define CHECK_LINE(code, tmp, line)                                                                \
    CHECK_RUN(code, "printf '%%s' '%s' >%s/h; hepta eval hellaswag %s/h -q", line, tmp, tmp)

TEST(cli_eval_json_lines) {
    const char *tmp = test_tmp_dir();
    CHECK_LINE(0, tmp,
               "{\"ctx\": \"Once upon\", \"endings\": [\"a time\", \"qq zz\"], \"label\": 0}");
    CHECK_SAYS("acc      100.00 % +- 0.00  (1 items)");
    CHECK_LINE(0, tmp, "{\"ctx\": \"\", \"endings\": [\"a time\", \"qq zz\"], \"label\": \"1\"}");
    CHECK_SAYS("acc        0.00 % +- 0.00  (1 items)");
    CHECK_LINE(1, tmp, "{\"ctx\": \"x\", \"endings\": [\"a\", \"b\"], \"label\": 2}");
    CHECK_SAYS("/h, line 1: expected \"label\"");
    CHECK_LINE(1, tmp, "{\"ctx\": \"x\", \"endings\": [\"a\", \"b\"], \"label\": -1}");
    CHECK_LINE(1, tmp, "{\"ctx\": \"x\", \"endings\": [\"a\", \"b\"], \"label\": \"12\"}");
    CHECK_LINE(1, tmp, "{\"ctx\": \"x\", \"endings\": [\"a\", \"b\"]}");
    CHECK_LINE(1, tmp, "{\"ctx\": \"x\", \"endings\": [\"a\"], \"label\": 0}");
    CHECK_LINE(1, tmp, "{\"ctx\": \"x\", \"endings\": [\"a\", 3], \"label\": 0}");
    CHECK_LINE(1, tmp, "{\"ctx\": \"x\", \"endings\": [\"a\", \"\"], \"label\": 0}");
    CHECK_SAYS("an ending is empty");
    CHECK_LINE(1, tmp, "{\"endings\": [\"a\", \"b\"], \"label\": 0}");
    CHECK_SAYS("\"ctx\"");
    CHECK_LINE(1, tmp, "{\"ctx\": ");
    CHECK_SAYS("line 1: no JSON");
    CHECK_LINE(1, tmp, "7");
    CHECK_LINE(1, tmp, "");
    CHECK_SAYS("no lines");
}

/* Shell: Ctrl-C for the program started last, a second after it began to catch it (SigCgt has bit
 * 1); its exit code. */
#define INTERRUPT                                                                                  \
    "p=$!; until grep -q '^SigCgt.*[2367abef]$' /proc/$p/status; do sleep 0.05; done; "            \
    "sleep 1; kill -INT $p; wait $p; "

/* Ctrl-C: what was done is printed, and said to be less than asked for. */
TEST(cli_eval_interrupt) {
    const char *tmp = test_tmp_dir(), *build = getenv("HEPTA_BUILD");
    CHECK_RUN(0,
              "seq 30000 | sed 's/.*/q &,1,2,3,4,A/' >%s/s_test.csv; "
              "%s/hepta eval mmlu %s --shots 0 -q & " INTERRUPT "test $? = 130",
              tmp, build != NULL ? build : "build", tmp);
    CHECK_SAYS("macro average");
    CHECK_SAYS("interrupted after ");
    CHECK_SAYS(" of 30000 questions");
    CHECK_RUN(0,
              "seq 3000 | sed 's/.*/{\"task_id\": \"&\", \"prompt\": \"x\"}/' >%s/h; "
              "%s/hepta eval humaneval %s/h -o %s/out -q & " INTERRUPT "test $? = 130",
              tmp, build != NULL ? build : "build", tmp, tmp);
    CHECK_SAYS(" of 3000 samples were written");
    int n = 0;
    CHECK(sscanf(strstr(output, "interrupted: "), "interrupted: %d", &n) == 1);
    CHECK_RUN(0, "test $(wc -l <%s/out) = %d", tmp, n);
}

TEST(cli_eval_humaneval) {
    const char *tmp = test_tmp_dir();
    CHECK_RUN(0,
              "printf '%%s\\n' '{\"task_id\": \"HumanEval/0\", \"prompt\": \"Once upon a time\", "
              "\"test\": \"x\"}' '{\"task_id\": \"t/1\", \"prompt\": \"The king \\u00e9\\n\"}' "
              ">%s/h; hepta eval humaneval %s/h --prompts",
              tmp, tmp);
    CHECK_EQ_STR(output, "{\"task_id\":\"HumanEval/0\",\"prompt\":\"Once upon a time\"}\n"
                         "{\"task_id\":\"t/1\",\"prompt\":\"The king \\u00E9\\n\"}\n");
    /* greedy: what run writes, as one JSON line */
    CHECK_RUN(0,
              "hepta eval humaneval %s/h -n 12 --limit 1 -o %s/out; printf '%%s' "
              "'{\"task_id\":\"HumanEval/0\",\"completion\":\"' >%s/expected; "
              "hepta run -p 'Once upon a time' --temp 0 -n 12 >%s/text; "
              "printf '%%s\"}\\n' \"$(cat %s/text)\" >>%s/expected; cmp %s/out %s/expected",
              tmp, tmp, tmp, tmp, tmp, tmp, tmp, tmp);
    CHECK_SAYS("1 samples, 1 of them cut at 12 tokens");
    CHECK_SAYS("evaluate_functional_correctness");
    /* seeds: the same again, and different from each other */
    CHECK_RUN(
        0,
        "for i in 1 2; do hepta eval humaneval %s/h -n 12 --samples 3 --temp 1 --seed 5 -q "
        ">%s/$i; done; cmp %s/1 %s/2; test $(wc -l <%s/1) = 6; test $(sort -u %s/1 | wc -l) = 6",
        tmp, tmp, tmp, tmp, tmp, tmp);
    CHECK_RUN(1, "hepta eval humaneval %s/h --ctx 3 -q", tmp);
    CHECK_SAYS("HumanEval/0: the prompt has");
    CHECK_RUN(1, "echo '{\"task_id\": 3}' >%s/h; hepta eval humaneval %s/h -q", tmp, tmp);
    CHECK_SAYS("line 1: expected \"task_id\" and \"prompt\"");
}

/* A completion ends before the first stop sequence, which may span tokens: with a tokenizer whose
 * pieces are all like "ef123\nd", two tokens make "\ndef". */
TEST(cli_eval_humaneval_stops) {
    const char *tmp = test_tmp_dir();
    char stories[512], path[600], piece[32];
    snprintf(stories, sizeof stories, "%s", test_need_data("models/stories260K.bin"));
    snprintf(path, sizeof path, "%s/tokenizer.bin", tmp);
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL);
    uint32_t n = 7;
    fwrite(&n, 4, 1, f);
    for (int i = 0; i < 512; i++) {
        float score = 0;
        snprintf(piece, sizeof piece, "ef%03d\nd", i);
        fwrite(&score, 4, 1, f);
        fwrite(&n, 4, 1, f);
        fwrite(piece, 1, n, f);
    }
    CHECK(fclose(f) == 0);
    CHECK_RUN(0,
              "echo '{\"task_id\": \"a\", \"prompt\": \"\"}' >%s/h; "
              "hepta eval humaneval %s/h %s --tokenizer %s -q | grep -cE "
              "'^.\"task_id\":\"a\",\"completion\":\"ef[0-9]{3}\".$'",
              tmp, tmp, stories, path);
    CHECK_EQ_STR(output, "1\n");
}

/* ---- report ------------------------------------------------------------ */

/* Figures against NumPy and gguf, and the page itself. */
TEST(cli_report_matches_numpy) {
    const char *python = python_and_build();
    int code =
        run("'%s' tests/compare_report.py " BASE " --build '%s'", python, getenv("HEPTA_BUILD"));
    if (code == 77 || code == 126 || code == 127) {
        SKIP("%s is missing, or has no numpy or gguf", python);
    }
    CHECK_EQ_INT(code, 0);
    test_note("%.*s", (int)strcspn(output, "\n"), output);
}

TEST(cli_report) {
    const char *tmp = test_tmp_dir();
    CHECK_RUN(0, "hepta report --help");
    CHECK_SAYS("Example");
    CHECK_RUN(2, "hepta report " BASE);
    CHECK_RUN(2, "hepta report " BASE " " MODEL " -f " TEXT " --limit 0");
    CHECK_RUN(1, "hepta report " MODEL " " MODEL);
    CHECK_SAYS("is quantized; the first model");
    CHECK_RUN(0, "hepta report " BASE " " MODEL " -q");
    CHECK_SAYS("ffn_down ");
    CHECK_RUN(0, "hepta report " BASE " " BASE " -f " TEXT " --limit 5 --json -q | "
                 "grep -E '\"(error|output_error|output_error_int8)\"' | sort -u");
    CHECK_EQ_STR(output, "      \"error\": 0.0,\n      \"output_error\": 0.0,\n"
                         "      \"output_error_int8\": 0.0\n");
    CHECK_RUN(1, "hepta report " BASE " " MODEL " -q -o /nonexistent/x.html");
    CHECK_SAYS("/nonexistent/x.html");
    CHECK_RUN(1, ": >%s/empty; hepta report " BASE " " MODEL " -q -f %s/empty", tmp, tmp);
    CHECK_SAYS("no tokens");
    CHECK_RUN(1, "hepta report %s " MODEL " -q", test_need_data("models/stories260K.bin"));
    CHECK_SAYS("different shapes");
}

/* Ctrl-C leaves no page. */
TEST(cli_report_interrupt) {
    const char *tmp = test_tmp_dir(), *build = getenv("HEPTA_BUILD");
    CHECK_RUN(0,
              "for i in $(seq 200); do cat README.md; done >%s/text; timeout --preserve-status "
              "-s INT 1 %s/hepta report " BASE " " MODEL " -q -f %s/text --limit 1000000 "
              "-o %s/page.html; test $? = 130; ls %s | grep -v text; true",
              tmp, build != NULL ? build : "build", tmp, tmp, tmp);
    CHECK_EQ_STR(output, "hepta: interrupted; nothing was written\n");
}

/* ---- bench/quality ----------------------------------------------------- */

TEST(quality_script) {
    const char *python = python_and_build(), *build = getenv("HEPTA_BUILD");
    CHECK_RUN(0,
              "HEPTA_DATA=/nonexistent '%s' bench/quality --build '%s' --models stories260K 2>&1",
              python, build);
    CHECK_SAYS("SKIP stories260K: /nonexistent/models/stories260K.bin");
    CHECK_SAYS("Left out: its files are absent.");
    CHECK_RUN(2, "'%s' bench/quality --build '%s' --models nonsense", python, build);
    CHECK_RUN(2, "'%s' bench/quality --build '%s' --llama-bin /nonexistent", python, build);
    (void)test_need_data("models/stories260K.bin");
    CHECK_RUN(0,
              "'%s' bench/quality --build '%s' --models stories260K --bits 8,7.77e9 --tokens 600",
              python, build);
    CHECK_SAYS("600 tokens of `tinystories_v1_train_first2MiB.txt`, windows of 512 every 256; "
               "unquantized: 32.00 bits");
    CHECK_SAYS("| **Hepta 8, `good`** | 8.");
    CHECK_SAYS("| **Hepta 7.77e9, `best`** | not possible: ");
    CHECK_RUN(0, "ls '%s' | grep ^tmp; true", build);
    CHECK_EQ_STR(output, ""); /* nothing is left */
}
