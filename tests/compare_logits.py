#!/usr/bin/env python3
"""Compares Hepta's logits with those of transformers' LlamaForCausalLM in float32.

    compare_logits.py MODEL... --dump build/logits_dump [--tokens N] [--threads N]
    compare_logits.py --random --dump build/logits_dump

MODEL is a Hugging Face directory, a GGUF file or a llama2.c .bin file; the reference is built here
from the weights, without Hepta's code. --random makes small models of many shapes and RoPE
variants. The tokens are random ids.

Prints the largest difference relative to the largest logit of its token; exit code 1 if it exceeds
1e-4. Needs torch, transformers and gguf (exit code 77 without them).
"""

import argparse
import os
import struct
import subprocess
import sys
import tempfile

LIMIT = 1e-4

try:
    import gguf
    import numpy as np
    import torch
    import transformers
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)


def half_split(w, n_heads):
    """llama2.c and GGUF rotate neighbours, transformers items half a head apart: reorder rows."""
    rows, dim = w.shape
    return w.view(n_heads, rows // n_heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def load_gguf(path):
    """Builds the model from an F32 or F16 GGUF file, read with the gguf package."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(t.data.astype("<f4")) for t in reader.tensors}

    def key(name):
        return reader.fields["llama." + name].contents()

    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0], hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"), num_hidden_layers=key("block_count"),
        num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=key("context_length"), rope_theta=key("rope.freq_base"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in tensors,
    )  # fmt: skip
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"],
             "model.norm.weight": tensors["output_norm.weight"],
             "lm_head.weight": tensors.get("output.weight", tensors["token_embd.weight"])}  # fmt: skip
    for name, w in tensors.items():
        if name.startswith("blk."):
            _, layer, kind, _ = name.split(".")
            w = half_split(w, heads) if kind == "attn_q" else w
            w = half_split(w, kv_heads) if kind == "attn_k" else w
            state[f"model.layers.{layer}.{names[kind]}.weight"] = w
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def load_llama2c(path):
    """Builds the model from karpathy/llama2.c's version 0 file: seven int32, then float32 weights."""
    with open(path, "rb") as f:
        data = f.read()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    tied, vocab = vocab > 0, abs(vocab)
    head = dim // heads
    weights = np.frombuffer(data, dtype="<f4", offset=28)
    at = 0

    def take(*shape):
        nonlocal at
        n = int(np.prod(shape))
        at += n
        return torch.from_numpy(weights[at - n : at].reshape(shape).copy())

    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context,
        rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": take(vocab, dim)}
    names = [  # in the file's order; every entry is stacked over the layers
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_heads * head, dim)),
        ("self_attn.v_proj", (kv_heads * head, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    for name, shape in names:
        for layer, w in enumerate(take(layers, *shape)):
            if name.endswith("q_proj"):
                w = half_split(w, heads)
            if name.endswith("k_proj"):
                w = half_split(w, kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = w
    state["model.norm.weight"] = take(dim)
    take(2, context, head // 2)  # RoPE tables of old versions
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else take(vocab, dim)
    model.load_state_dict(state)
    return model


def load_reference(path):
    if os.path.isdir(path):
        return transformers.LlamaForCausalLM.from_pretrained(path).float()
    return load_gguf(path) if path.endswith(".gguf") else load_llama2c(path)


def run_dump(program, model, ids, threads):
    with tempfile.TemporaryDirectory() as folder:
        ids_path, out_path = os.path.join(folder, "ids"), os.path.join(folder, "logits")
        ids.astype("<i4").tofile(ids_path)
        subprocess.run([program, model, ids_path, out_path, str(threads)], check=True)
        return np.fromfile(out_path, dtype="<f4")


def compare(path, program, n_tokens, threads):
    reference = load_reference(path).eval()
    vocab, context = reference.config.vocab_size, reference.config.max_position_embeddings
    ids = np.random.default_rng(1).integers(0, vocab, n_tokens or context)
    found = run_dump(program, path, ids, threads)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = found.reshape(expected.shape)
    difference = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    worst = int(difference.argmax())
    same = int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
    print(
        f"{os.path.basename(path.rstrip('/'))}: {len(ids)} tokens, largest relative difference "
        f"{difference.max():.2e} (token {worst}), {same} of {len(ids)} choose the same next token"
    )
    return bool(difference.max() <= LIMIT)


def random_models(folder):
    """Writes small random models and yields their directories."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    linear = {"rope_type": "linear", "factor": 4.0}
    variants = {
        "plain": {},
        "untied-odd-widths": {"hidden_size": 56, "intermediate_size": 172, "vocab_size": 77},
        "llama3-rope": {"rope_scaling": llama3},
        "linear-rope": {"rope_scaling": linear, "rope_theta": 500000.0},
        "one-kv-head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
        "wide-heads": {"head_dim": 48},
        "bfloat16": {"dtype": torch.bfloat16},
        "float16": {"dtype": torch.float16},
    }
    for name, changes in variants.items():
        settings = dict(
            vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            rms_norm_eps=1e-5, initializer_range=0.3, tie_word_embeddings=False,
        )  # fmt: skip
        settings.update(changes)
        dtype = settings.pop("dtype", torch.float32)
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).to(dtype)
        path = os.path.join(folder, name)
        model.save_pretrained(path)
        yield path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--random", action="store_true", help="small random models")
    parser.add_argument("--dump", required=True, help="path of build/logits_dump")
    parser.add_argument("--tokens", type=int, default=0, help="default: the whole context")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        models = list(args.models) + (list(random_models(folder)) if args.random else [])
        results = [compare(path, args.dump, args.tokens, args.threads) for path in models]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
