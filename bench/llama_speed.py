"""Prompt and generation speed of llama.cpp, by way of llama-cpp-python's low-level interface.

    llama_speed.py MODEL PROMPT GENERATE THREADS FLASH_ATTENTION(0|1)

The same steps as llama-bench, with its defaults (batch 2048, micro-batch 512, F16 cache, the
file mapped): random tokens, one run to warm up, the context emptied before each test. Prints JSON.
"""

import ctypes
import json
import random
import sys
import time

import llama_cpp as ll


def main(path, n_prompt, n_generate, n_threads, flash):
    ll.llama_backend_init()
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    params = ll.llama_model_default_params()
    params.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(f"{path}: llama.cpp cannot load it")
    params = ll.llama_context_default_params()
    params.n_ctx = max(n_prompt, n_generate)
    params.n_batch, params.n_ubatch = 2048, 512
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type = 1 if flash else 0
    context = ll.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"{path}: llama.cpp cannot make a context")
    memory = ll.llama_get_memory(context)
    n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    random.seed(1)

    def decode(tokens):
        """The logits of the last token are computed, as by llama-bench."""
        array = (ll.llama_token * len(tokens))(*tokens)
        if ll.llama_decode(context, ll.llama_batch_get_one(array, len(tokens))) != 0:
            sys.exit(f"{path}: llama_decode failed")
        ll.llama_synchronize(context)

    def draw(n):
        return [random.randrange(n_vocab) for _ in range(n)]

    def prompt(n):
        for at in range(0, n, params.n_batch):
            decode(draw(min(n - at, params.n_batch)))

    def generate(n):
        for _ in range(n):
            decode(draw(1))

    result = {}
    for name, test, n in (("prompt", prompt, n_prompt), ("generation", generate, n_generate)):
        ll.llama_memory_clear(memory, True)
        test(n if name == "prompt" else 1)
        ll.llama_memory_clear(memory, True)
        started = time.perf_counter()
        test(n)
        result[name] = n / (time.perf_counter() - started)
    print(json.dumps(result))


main(sys.argv[1], *map(int, sys.argv[2:]))
