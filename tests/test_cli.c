/*
 * test_cli.c - the program as a user meets it: exit codes, messages, output, Ctrl-C.
 *
 * Runs $HEPTA_BUILD/hepta (default build/hepta) through the shell.
 */
#include "command.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static char model[512], tokenizer[512], tmp[512];

static void need_stories(void) {
    snprintf(model, sizeof model, "%s", test_need_data("models/stories260K.bin"));
    snprintf(tokenizer, sizeof tokenizer, "%s", test_need_data("models/tok512.bin"));
    snprintf(tmp, sizeof tmp, "%s", test_tmp_dir());
}

TEST(cli_help_and_wrong_usage) {
    CHECK_RUN(2, "hepta");
    CHECK_RUN(0, "hepta --help");
    CHECK_SAYS("Commands:");
    CHECK_RUN(0, "hepta --version");
    CHECK_RUN(2, "hepta nonsense");
    CHECK_SAYS("unknown command nonsense");
    static const char *const commands[] = {"run",           "quantize",   "inspect", "verify",
                                           "tokenize",      "perplexity", "bench",   "bench code",
                                           "bench kernels", "synth"};
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        CHECK_RUN(0, "hepta %s --help", commands[i]);
        CHECK_SAYS("Example");
        CHECK_RUN(2, "hepta %s --no-such-option", commands[i]);
    }
    CHECK_RUN(2, "hepta run --no-such-option");
    CHECK_SAYS("hepta: unrecognized option");
    CHECK_RUN(2, "hepta run -p x --temp warm");
    CHECK_SAYS("expected a number");
    CHECK_RUN(2, "hepta run -p x -n -5");
    CHECK_RUN(2, "hepta run -p x --threads 99999999");
    CHECK_RUN(2, "hepta run -p x --cache q4");
    CHECK_SAYS("expected f32, f16 or q8");
    CHECK_RUN(2, "hepta run -p x -f y");
    CHECK_RUN(2, "hepta quantize x");
    CHECK_SAYS("-o OUT");
    CHECK_RUN(2, "hepta quantize x -o y --without plan,all");
    CHECK_SAYS("expected feedback, scales, plan");
    CHECK_RUN(2, "hepta perplexity x");
    CHECK_RUN(2, "hepta inspect a b");
    CHECK_SAYS("unexpected argument b");
}

TEST(cli_files_that_are_no_models) {
    need_stories();
    CHECK_RUN(1, "hepta run /nonexistent.hepta -p x");
    CHECK_SAYS("/nonexistent.hepta");
    CHECK_RUN(1, "hepta inspect /etc/passwd");
    CHECK_RUN(1, "hepta run %s -p x", tmp);
    CHECK_SAYS("config.json");
    CHECK_RUN(1, "hepta run %s -p x", model); /* no tokenizer */
    CHECK_SAYS("--tokenizer");
    CHECK_RUN(1, "hepta quantize %s -o %s/x.hepta", model, tmp);
    CHECK_SAYS("--tokenizer");
    CHECK_RUN(1, "hepta quantize %s -o /nonexistent/x.hepta --tokenizer %s", model, tokenizer);
    CHECK_SAYS("/nonexistent/x.hepta");
    CHECK_RUN(1, "hepta quantize %s -o %s/x.hepta --tokenizer %s --bits 9", model, tmp, tokenizer);
    CHECK_SAYS("expected 2 to 8");
    CHECK_RUN(0, "mkfifo %s/pipe; hepta quantize %s -o %s/pipe --tokenizer %s; test $? = 1", tmp,
              model, tmp, tokenizer);
    CHECK_SAYS("not a regular file");
    CHECK_RUN(0, "timeout 10 %s/hepta inspect %s/pipe; test $? = 1; test -p %s/pipe && rm %s/pipe",
              getenv("HEPTA_BUILD") != NULL ? getenv("HEPTA_BUILD") : "build", tmp, tmp, tmp);
    CHECK_SAYS("not a regular file");
    CHECK_RUN(0,
              "sed s/llama/qwen2/ %s >%s/q.gguf; hepta quantize %s/q.gguf -o %s/x.hepta; "
              "test $? = 1; rm %s/q.gguf",
              "models/hepta-stories-7m-f16.gguf", tmp, tmp, tmp, tmp);
    CHECK_SAYS("architecture \"qwen2\""); /* before the work, not after */
    CHECK_RUN(0, ": >%s/empty; hepta inspect %s/empty; test $? = 1", tmp, tmp);
    CHECK_RUN(1, "hepta run -p x %s --tokenizer /nonexistent", model);
    CHECK_RUN(0, "ls %s", tmp);
    CHECK_EQ_STR(output, "empty\n");
}

TEST(cli_quantize_verify_inspect_run) {
    need_stories();
    CHECK_RUN(0, "hepta quantize %s -o %s/m.hepta --tokenizer %s", model, tmp, tokenizer);
    CHECK_SAYS("bits per weight");
    CHECK_RUN(0, "hepta verify %s/m.hepta", tmp);
    CHECK_SAYS("good");
    CHECK_RUN(0, "hepta inspect %s/m.hepta", tmp);
    CHECK_SAYS("blk.4.ffn_down.weight");
    CHECK_SAYS("hepta.recipe");
    CHECK_RUN(0, "hepta inspect %s/m.hepta --json", tmp);
    CHECK_SAYS("\"bits_per_weight\"");
    CHECK_RUN(0, "hepta run %s/m.hepta -p 'Once upon a time' -n 20 --temp 0 --echo --stats", tmp);
    CHECK_SAYS("Once upon a time");
    CHECK_SAYS("tokens/s");
    CHECK_RUN(0, "hepta run %s/m.hepta -p '' -n 5 --json", tmp); /* empty prompt: from BOS */
    CHECK_SAYS("\"prompt_tokens\": 1");
    CHECK_SAYS("\"generated_tokens\": 5");
    CHECK_RUN(0, "hepta run %s/m.hepta -p 'Once' -n 0 --digest", tmp);
    CHECK_SAYS("logits sha256 ");
    CHECK_RUN(0, "echo 'Once upon' | hepta run %s/m.hepta -n 3", tmp);
    CHECK_RUN(0, "hepta run %s/m.hepta -p Once -n 100000 --temp 0 --json", tmp); /* fills it */
    CHECK_RUN(0,
              "for i in 1 2 3 4 5 6 7 8 9; do printf 'a b c d e f g h i j k l m n o p '; done "
              ">%s/long; hepta run %s/m.hepta -f %s/long -n 1 -c 64; test $? = 1",
              tmp, tmp, tmp);
    CHECK_SAYS("the context holds 64");
    CHECK_RUN(0, "hepta run %s/m.hepta -p 'Once upon a' -n 30 --temp 0 --stop girl --json", tmp);
    CHECK(strstr(output, "girl") == NULL);
    CHECK_SAYS("\"finish_reason\": \"stop\"");
    CHECK_RUN(0, "hepta perplexity %s/m.hepta -f %s/long --ctx 64 --json -q", tmp, tmp);
    CHECK_SAYS("\"perplexity\"");
    CHECK_RUN(1, ": >%s/short; hepta perplexity %s/m.hepta -f %s/short -q", tmp, tmp, tmp);
    CHECK_SAYS("two or more");
    CHECK_RUN(0,
              "printf damage | dd of=%s/m.hepta bs=1 seek=150000 conv=notrunc status=none; "
              "hepta verify %s/m.hepta; test $? = 1",
              tmp, tmp);
    CHECK_SAYS("m.hepta");
}

/* The emulated device gives the CPU's text and logits; `auto` says why it took the CPU. */
TEST(cli_devices) {
    static const char command[] = "hepta run -p 'Once' --seed 1 -n 3 --digest";
    static const char *const options[] = {"--cache q8 --gpu-layers 3",
                                          "--gpu-mem 0.002 --gpu-stream"};
    static char expected[MAX_OUTPUT + 1];
    for (int i = 0; i < 2; i++) {
        CHECK_RUN(0, "%s %s", command, i == 0 ? "--cache q8" : "");
        memcpy(expected, output, sizeof expected);
        CHECK_RUN(0, "%s --device emulated %s", command, options[i]);
        CHECK_EQ_STR(output, expected);
    }
    CHECK_RUN(0, "export HEPTA_GPU_PATH=/nonexistent; %s --device auto", command);
    CHECK_SAYS("hepta: device: CPU (no GPU: libhepta-cuda.so is not there");
    CHECK_SAYS(strstr(expected, "logits sha256"));
    CHECK_RUN(1, "export HEPTA_GPU_PATH=/nonexistent; %s --device cuda", command);
    CHECK_SAYS("make CUDA=1");
    CHECK_RUN(1, "%s --device gpu0", command);
    CHECK_SAYS("expected cpu, auto");
    CHECK_RUN(1, "export HEPTA_EMULATED_FAULT=lost=3; %s --device emulated", command);
    CHECK_SAYS("the device is lost");
    CHECK_RUN(1, "%s --device emulated --gpu-mem 0.0001", command);
    CHECK_SAYS("--gpu-mem");
}

/* Options that would be ignored are refused. */
TEST(cli_quantize_schemes) {
    static const char base[] = "hepta quantize models/hepta-stories-7m-f16.gguf -o";
    static const char *const unused[] = {"--bits 3.5", "--plan x", "--plan-out x", "--effort good",
                                         "--calibrate x"};
    const char *folder = test_tmp_dir();
    for (size_t i = 0; i < sizeof unused / sizeof unused[0]; i++) {
        char name[32];
        snprintf(name, sizeof name, "%.*s does not go", (int)strcspn(unused[i], " "), unused[i]);
        CHECK_RUN(2, "%s %s/p.gguf --scheme int4 %s", base, folder, unused[i]);
        CHECK_SAYS(name);
    }
    CHECK_RUN(2, "%s %s/p.gguf --scheme int5", base, folder);
    CHECK_RUN(2, "%s %s/p.gguf --awq", base, folder);
    CHECK_SAYS("--awq goes with --scheme");
    CHECK_RUN(2, "%s %s/p.gguf --group 32", base, folder);
    CHECK_RUN(1, "%s %s/p.gguf --scheme int4 --awq --calibrate /nonexistent -q", base, folder);
    CHECK_SAYS("/nonexistent");
    CHECK_RUN(0, "ls %s", folder);
    CHECK_EQ_STR(output, "");
    CHECK_RUN(0, "%s %s/p.gguf --scheme int8 -q && ls %s", base, folder, folder);
    CHECK_SAYS("8.095 bits per weight");
}

TEST(cli_same_digest_for_threads_and_kernels) {
    need_stories();
    char digest[128] = "";
    CHECK_RUN(0, "hepta quantize %s -o %s/m.hepta --tokenizer %s -q", model, tmp, tokenizer);
    static const char *const kernels[] = {"", "ref", "avx2", "avx512", "amx"};
    int n = 0;
    for (size_t k = 0; k < sizeof kernels / sizeof kernels[0]; k++) {
        for (int threads = 1; threads <= 4; threads++) {
            int code = run("HEPTA_KERNELS=%s hepta run %s/m.hepta -p 'Once upon a time' -n 40 "
                           "--digest --threads %d",
                           kernels[k], tmp, threads);
            if (code != 0 && strstr(output, "HEPTA_KERNELS") != NULL && kernels[k][0] == 'a') {
                test_note("%s kernels: not on this machine", kernels[k]);
                break;
            }
            CHECK_EQ_INT(code, 0);
            const char *found = strstr(output, "logits sha256 ");
            CHECK(found != NULL);
            if (digest[0] == '\0') {
                snprintf(digest, sizeof digest, "%.78s", found);
            }
            CHECK(strncmp(found, digest, 78) == 0);
            n++;
        }
    }
    test_note("%d runs, one digest", n);
}

TEST(cli_tokenize_round_trip) {
    need_stories();
    CHECK_RUN(0, "hepta tokenize --tokenizer %s -p 'Hello, world' ", tokenizer);
    CHECK_RUN(0,
              "printf 'a\\000b\\377\\n' >%s/b; hepta tokenize --tokenizer %s -f %s/b | "
              "hepta tokenize --tokenizer %s -d >%s/c; cmp %s/b %s/c",
              tmp, tokenizer, tmp, tokenizer, tmp, tmp, tmp);
    CHECK_RUN(1, "echo 99999 | hepta tokenize --tokenizer %s -d", tokenizer);
    CHECK_SAYS("no token id");
    CHECK_RUN(0, "hepta tokenize --tokenizer %s -p 'Hello' --json --pieces", tokenizer);
}

/* Without BOS the first token has nothing before it, also where windows do not overlap. */
TEST(cli_perplexity_without_bos) {
    need_stories();
    CHECK_RUN(
        0,
        "cd %s; printf '{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":5,\"b\":6,\"ab\":511},"
        "\"merges\":[]},\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false}}' "
        ">small.json; sed s/511/512/ small.json >large.json; printf abababababababababab >text",
        tmp);
    CHECK_RUN(0, "hepta perplexity %s --tokenizer %s/small.json -f %s/text -q --ctx 8 --stride 7",
              model, tmp, tmp);
    CHECK_SAYS("(19 tokens, ctx 8, stride 7");
    CHECK_RUN(1, "hepta perplexity %s --tokenizer %s/small.json -f %s/text -q --ctx 8 --stride 8",
              model, tmp, tmp);
    CHECK_SAYS("a stride below it");
    CHECK_RUN(1, "hepta perplexity %s --tokenizer %s/large.json -f %s/text -q", model, tmp, tmp);
    CHECK_SAYS("do not belong together");
    CHECK_RUN(1, "hepta run %s --tokenizer %s/small.json -p ''", model, tmp);
    CHECK_SAYS("no BOS token");
}

/* JSON stays JSON, whatever bytes a path has. */
TEST(cli_json_of_odd_paths) {
    need_stories();
    CHECK_RUN(0, "ln -s $(realpath %s) \"$(printf '%s/m\\377.bin')\"", model, tmp);
    CHECK_RUN(0, "hepta inspect %s/m*.bin --json", tmp);
    CHECK_SAYS("/m\xEF\xBF\xBD.bin\"");
    CHECK_RUN(0, "hepta run %s/m*.bin --tokenizer %s -p x -n 2 --json", tmp, tokenizer);
    CHECK_SAYS("/m\xEF\xBF\xBD.bin\"");
}

/* A tokenizer.bin of llama2.c with `n` tokens; from the fourth on each has `bytes` bytes. */
static void write_tokenizer(const char *path, uint32_t n, uint32_t bytes) {
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL);
    fwrite(&bytes, 4, 1, f);
    for (uint32_t i = 0; i < n; i++) {
        float score = -(float)i;
        fwrite(&score, 4, 1, f);
        fwrite(&bytes, 4, 1, f);
        for (uint32_t k = 0; k < bytes; k++) {
            fputc(k == 0 ? '<' : k + 1 == bytes ? '>' : 'a' + (int)(i >> 4 * (k % 3) & 15), f);
        }
    }
    CHECK(fclose(f) == 0);
}

/* Tokens are printed whole, however long they are. */
TEST(cli_long_tokens) {
    need_stories();
    char path[600];
    snprintf(path, sizeof path, "%s/long.bin", tmp);
    write_tokenizer(path, 512, 3000);
    CHECK_RUN(0, "test $(echo 5 6 | hepta tokenize --tokenizer %s -d | wc -c) = 6000", path);
    CHECK_RUN(0, "hepta run %s --tokenizer %s -p '' -n 3 --temp 0 | wc -c", model, path);
    CHECK_EQ_STR(output, "9001\n"); /* a line break at the end */
}

TEST(cli_stop_at_the_first_of_several) {
    need_stories();
    static const char *const stops[] = {"--stop 'here was' --stop 'there was'",
                                        "--stop 'there was' --stop 'here was'"};
    for (size_t i = 0; i < 2; i++) {
        CHECK_RUN(0, "hepta run %s --tokenizer %s -p 'Once upon a' -n 30 --temp 0 %s", model,
                  tokenizer, stops[i]);
        CHECK_EQ_STR(output, " time, \n");
    }
}

TEST(cli_tokenize_refuses) {
    need_stories();
    CHECK_RUN(2, "hepta tokenize --tokenizer %s -p x -f y", tokenizer);
    CHECK_SAYS("not both");
    CHECK_RUN(2, "echo 400 | hepta tokenize --tokenizer %s -d --json", tokenizer);
    CHECK_RUN(1, "printf '400 \\000 401' | hepta tokenize --tokenizer %s -d", tokenizer);
    CHECK_SAYS("at byte 4");
}

/*
 * Ctrl-C once or twice while quantizing, the end of the terminal, a kill, and nobody to read the
 * progress: the .part file alone is left, and the last run makes of it what one run would.
 */
TEST(cli_interrupt_keeps_a_part) {
    static const char bundled[] = "models/hepta-stories-7m-f16.gguf";
    static const int signals[] = {SIGINT, SIGINT, SIGHUP, SIGKILL, SIGKILL};
    if (access(bundled, R_OK) != 0) {
        SKIP("%s is absent", bundled);
    }
    snprintf(tmp, sizeof tmp, "%s", test_tmp_dir());
    const char *build = getenv("HEPTA_BUILD");
    char program[512], out[600];
    snprintf(program, sizeof program, "%s/hepta", build != NULL ? build : "build");
    snprintf(out, sizeof out, "%s/m.hepta", tmp);
    for (size_t round = 0; round < sizeof signals / sizeof signals[0]; round++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            signal(SIGHUP, SIG_DFL); /* nohup ignores it */
            execl(program, program, "quantize", bundled, "-o", out, "-q", "--effort", "fast", "-b",
                  "8", (char *)NULL);
            _exit(127);
        }
        char pattern[700];
        snprintf(pattern, sizeof pattern, "ls %s | grep -q part", tmp);
        int waited = 0;
        while (system(pattern) != 0 && waited++ < 3000) {
            usleep(10000);
        }
        usleep((useconds_t)round * 100000);
        kill(pid, signals[round]);
        if (round == 1) {
            usleep(1000);
            kill(pid, SIGINT);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid);
        if (signals[round] == SIGKILL) {
            CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
        } else {
            CHECK(WIFEXITED(status));
            CHECK(WEXITSTATUS(status) == 130 || WEXITSTATUS(status) == 0);
        }
    }
    CHECK_RUN(
        0,
        "(hepta quantize %s -o %s/p.hepta --effort fast -b 8 2>&1 >/dev/null) | "
        "head -c 1 >/dev/null; rm -f %s/p.hepta*; hepta quantize %s -o %s -q --effort fast -b 8",
        bundled, tmp, tmp, bundled, out);
    CHECK_RUN(0,
              "hepta quantize %s -o %s/whole.hepta -q --effort fast -b 8; cd %s; "
              "cmp m.hepta whole.hepta; ls",
              bundled, tmp, tmp);
    CHECK_SAYS("m.hepta\nwhole.hepta\n");
}

/* A digest of a part of a run, which depends on the moment of the interrupt, is none. */
TEST(cli_interrupted_run_has_no_digest) {
    static const char bundled[] = "models/hepta-stories-7m.hepta";
    if (access(bundled, R_OK) != 0) {
        SKIP("%s is absent", bundled);
    }
    const char *folder = test_tmp_dir();
    for (int json = 0; json < 2; json++) {
        CHECK_RUN(130,
                  "cd %s && rm -f text && mkfifo go 2>/dev/null; cd - >/dev/null; "
                  "${HEPTA_BUILD:-build}/hepta run %s -n 30000 -c 30000 --temp 0 --digest "
                  "%s -f %s/go >%s/text & pid=$!; printf 'Once upon a time' >%s/go; sleep 0.5; "
                  "kill -INT $pid; wait $pid; code=$?; cat %s/text; exit $code",
                  folder, bundled, json ? "--json" : "", folder, folder, folder, folder);
        CHECK_SAYS(json ? "\"finish_reason\": \"interrupted\"" : "interrupted: no digest");
        CHECK(strstr(output, "sha256") == NULL);
    }
    CHECK_RUN(0, "hepta run %s -p Once -n 3 --digest", bundled);
    CHECK_SAYS("logits sha256 ");
}

/* The program stops quietly when nobody reads on. */
TEST(cli_closed_pipe) {
    need_stories();
    CHECK_RUN(0, "hepta run %s --tokenizer %s -p Once -n 200 | head -c 20 >/dev/null", model,
              tokenizer);
    CHECK_RUN(1, "hepta --version >/dev/full");
    CHECK_SAYS("standard output");
    static const char *const commands[] = {"inspect", "inspect --json", "verify", "verify --help",
                                           "run -p Once -n 4 --tokenizer"};
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        CHECK_RUN(1, "hepta %s %s %s >/dev/full", commands[i], i == 4 ? tokenizer : "", model);
        CHECK_SAYS("standard output");
    }
    CHECK_RUN(1, "hepta tokenize --tokenizer %s -p Once >/dev/full", tokenizer);
    CHECK_SAYS("standard output");
}
