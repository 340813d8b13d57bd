/*
 * test_allocation.c - nothing is allocated while text is generated.
 *
 * The linker sends every call of malloc, mmap and their kin in the library to the functions below
 * (--wrap, see the Makefile), which count and pass on; what libc calls inside itself they do
 * not see.
 */
#include "test.h"

#include "hepta.h"

#include "base/base.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

static atomic_uint_least64_t n_calls;

#define WRAP(type, name, parameters, arguments)                                                    \
    type __real_##name parameters;                                                                 \
    type __wrap_##name parameters;                                                                 \
    type __wrap_##name parameters {                                                                \
        atomic_fetch_add(&n_calls, 1);                                                             \
        return __real_##name arguments;                                                            \
    }

WRAP(void *, malloc, (size_t n), (n))
WRAP(void *, calloc, (size_t n, size_t size), (n, size))
WRAP(void *, realloc, (void *p, size_t n), (p, n))
WRAP(void *, aligned_alloc, (size_t alignment, size_t n), (alignment, n))
WRAP(int, posix_memalign, (void **p, size_t alignment, size_t n), (p, alignment, n))
WRAP(void *, mmap, (void *p, size_t n, int protection, int flags, int file, off_t offset),
     (p, n, protection, flags, file, offset))

TEST(allocation_calls_are_counted) {
    uint64_t before = n_calls;
    void *volatile p = malloc(1);
    CHECK(n_calls == before + 1);
    p = realloc(p, 2);
    CHECK(n_calls == before + 2);
    free(p);
    p = memory_alloc(1, 1);
    CHECK(n_calls == before + 3);
    memory_free(p);
}

/* A prompt, then 40 steps: sequence 0 alone, and all sequences in a batch. */
static void generate(const hepta_model *model, const hepta_tokenizer *tokenizer,
                     hepta_cache_type cache, int threads) {
    enum { SEQUENCES = 3, PROMPT = 30 };
    hepta_error err;
    hepta_session *s = NULL;
    hepta_sampler *sampler = NULL;
    hepta_model_info info;
    hepta_model_get_info(model, &info);
    const hepta_session_options options = {
        .threads = threads, .n_batch = 16, .cache_type = cache, .n_sequences = SEQUENCES};
    CHECK_OK(hepta_session_create(model, &options, &s, &err));
    const hepta_sampler_options sampling = {.temperature = 1.0f, .top_k = 50, .top_p = 0.9f};
    CHECK_OK(hepta_sampler_create(&sampling, info.n_vocab, &sampler, &err));
    float *logits = malloc((size_t)SEQUENCES * info.n_vocab * sizeof *logits);
    CHECK(logits != NULL);
    int32_t prompt[PROMPT];
    for (int i = 0; i < PROMPT; i++) {
        prompt[i] = (int32_t)test_random_below(info.n_vocab);
    }
    hepta_batch_token batch[SEQUENCES * PROMPT];
    for (uint32_t i = 0; i < SEQUENCES * PROMPT; i++) {
        batch[i] = (hepta_batch_token){prompt[i % PROMPT], i % SEQUENCES, false};
    }
    char text[256];

    const uint64_t before = n_calls;
    CHECK_OK(hepta_session_eval(s, prompt, PROMPT, logits, false, &err));
    CHECK_OK(hepta_session_eval_batch(s, batch, SEQUENCES * PROMPT, NULL, &err));
    for (int step = 0; step < 40; step++) {
        int32_t token = hepta_sampler_draw(sampler, logits);
        hepta_tokenizer_decode(tokenizer, token, step == 0, true, text, sizeof text);
        CHECK_OK(hepta_session_eval(s, &token, 1, logits, false, &err));
        for (uint32_t i = 0; i < SEQUENCES; i++) {
            batch[i] = (hepta_batch_token){token, i, true};
        }
        CHECK_OK(hepta_session_eval_batch(s, batch, SEQUENCES, logits, &err));
        if (step % 16 == 15) {
            hepta_session_truncate(s, 0, 10);
        }
    }
    CHECK_EQ_INT(n_calls, before);

    free(logits);
    hepta_sampler_free(sampler);
    hepta_session_free(s);
}

TEST(allocation_none_while_generating) {
    hepta_error err;
    const char *const paths[] = {"models/hepta-stories-7m.hepta",
                                 "models/hepta-stories-7m-f16.gguf"};
    for (int i = 0; i < 2; i++) {
        hepta_model *model = NULL;
        hepta_tokenizer *tokenizer = NULL;
        CHECK_OK(hepta_model_open(paths[i], &model, &err));
        CHECK_OK(hepta_tokenizer_open(paths[i], NULL, &tokenizer, &err));
        for (int cache = 0; cache <= HEPTA_CACHE_Q8; cache++) {
            generate(model, tokenizer, (hepta_cache_type)cache, 1 + cache);
        }
        hepta_tokenizer_free(tokenizer);
        hepta_model_close(model);
    }
}
