#!/usr/bin/env python3
"""Compares the weights that Hepta reads from quantized models with published implementations.

    compare_dequantize.py gguf --build BUILD    gguf.quants.dequantize, bit by bit
    compare_dequantize.py gptq --build BUILD    AutoGPTQ's dequantization in PyTorch
    compare_dequantize.py awq --build BUILD     AutoAWQ's
    compare_dequantize.py golden                the digests in tests/test_dequantize.c

gguf: one file for each block type, of random blocks with scales of every kind (subnormal, largest,
infinite, NaN); then a model of mixed types, which must give the logits of the same weights in F32,
bit by bit, and the same quantized tensors.

gptq, awq: Hugging Face directories of random integers, zero points and scales in every supported
layout, against the packages' own Python code, imported from their files (nothing of CUDA is
needed); logits and quantized tensors as for gguf.

Exit code 77 without the packages.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

try:
    import gguf
    import numpy as np
    import safetensors.torch
    import torch
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)

# Block types and the places of their binary16 scales.
TYPES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
         "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
         "IQ4_NL": [0], "IQ4_XS": [0]}  # fmt: skip


def qtype(name):
    return gguf.GGMLQuantizationType[name]


def splitmix64(seed, n):
    """The first n numbers of the generator that tests/test_dequantize.c uses too."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


def dequantize(raw, name):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, qtype(name))


def golden():
    for name, scales in TYPES.items():
        _, size = gguf.GGML_QUANT_SIZES[qtype(name)]
        raw = splitmix64(7, 512 * size).astype(np.uint8).reshape(512, size)
        for at in scales:
            raw[:, at + 1] &= 0xBF  # finite
        digest = hashlib.sha256(dequantize(raw, name).tobytes()).hexdigest()
        print(f'        {{TENSOR_{name}, {{{", ".join(map(str, scales))}}}, "{digest}"}},')


def random_blocks(rng, name, n_rows, n_cols, scales=None):
    """Random rows of a type; scales: None for any binary16 at all, or the largest magnitude."""
    items, size = gguf.GGML_QUANT_SIZES[qtype(name)]
    n = n_rows * n_cols // items
    raw = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for at in TYPES[name]:
        if scales is None:
            half = rng.integers(0, 65536, n).astype("<u2")
            special = [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00]
            half[: len(special)] = rng.permutation(special)
        else:
            half = rng.uniform(-scales, scales, n).astype("<f2").view("<u2")
        raw[:, at : at + 2] = half.view(np.uint8).reshape(n, 2)
    return raw.reshape(n_rows, n_cols // items * size)


def dump(build, model, folder):
    out = os.path.join(folder, "values")
    text = subprocess.run([f"{build}/tensor_dump", model, out], check=True, capture_output=True, text=True).stdout
    values, result, at = np.fromfile(out, dtype="<f4"), {}, 0
    for line in text.splitlines():
        name, rows, cols = line.split()
        n = int(rows) * int(cols)
        result[name] = values[at : at + n].reshape(int(rows), int(cols))
        at += n
    assert at == values.size
    return result


def same_bits(a, b):
    """Equal bit by bit, where a NaN equals any other."""
    return a.shape == b.shape and bool(((a.view("<u4") == b.view("<u4")) | (np.isnan(a) & np.isnan(b))).all())


def check_types(build, folder):
    rng = np.random.default_rng(1)
    for name in TYPES:
        raw = random_blocks(rng, name, 64, 1024)
        path = os.path.join(folder, f"{name}.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("w", raw, raw_dtype=qtype(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found, expected = dump(build, path, folder)["w"], dequantize(raw, name)
        if not same_bits(found, expected):
            bad = np.argwhere(~((found.view("<u4") == expected.view("<u4")) | np.isnan(expected)))[0]
            sys.exit(f"{name}: weight {tuple(bad)} is {found[tuple(bad)]!r}, gguf says {expected[tuple(bad)]!r}")
        print(f"{name}: {found.size} weights with the same bits, {int(np.isfinite(found).sum())} of them finite")


def write_model(path, tensors):
    """tensors: name to (array, type)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [bytes([97 + i]) for i in range(26)] + [b"?"] * 3)
    writer.add_token_scores([0.0] * 32)
    writer.add_token_types([2, 3, 3] + [1] * 29)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mixed_model(rng):
    """A model like a Q4_K_M file, but with every type there is."""
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
              "ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}  # fmt: skip
    names = ["token_embd.weight", "output.weight"]
    names += [f"blk.{i}.{kind}.weight" for i in range(2) for kind in shapes]
    kinds = ["Q6_K", "Q4_K", *[k for k in TYPES if k not in ("Q4_K", "Q6_K")], "Q4_K", "Q6_K", "F16", "BF16"]
    quantized, plain = {}, {}
    for name, kind in zip(names, kinds):
        shape = shapes[name.split(".")[2]] if name.startswith("blk") else (32, 256)
        if kind == "F16" or kind == "BF16":
            raw = rng.normal(0, 0.05, shape).astype("<f2")
            values = raw.astype("<f4")
            if kind == "BF16":
                values = (values.view("<u4") & np.uint32(0xFFFF0000)).view("<f4")
                raw = (values.view("<u4") >> 16).astype("<u2").view(np.uint8)
        else:
            raw = random_blocks(rng, kind, *shape, scales=0.0005 if kind.endswith("K") else 0.004)
            values = dequantize(raw, kind)
        quantized[name] = (raw, qtype(kind))
        plain[name] = (values, qtype("F32"))
    for name in ["output_norm.weight", *[f"blk.{i}.{n}_norm.weight" for i in range(2) for n in ("attn", "ffn")]]:
        norm = (rng.uniform(0.5, 1.5, 256).astype("<f4"), qtype("F32"))
        quantized[name] = plain[name] = norm
    return quantized, plain


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True)


def check_same_model(build, folder, first, second):
    """Same logits bit by bit, same tensors after hepta quantize."""
    tokenizer = os.path.join(folder, "tokenizer.gguf")
    write_model(tokenizer, {})
    logits, hashes = [], []
    ids = os.path.join(folder, "ids")
    np.random.default_rng(2).integers(0, 32, 48).astype("<i4").tofile(ids)
    for path in (first, second):
        out, packed = os.path.join(folder, "logits"), os.path.join(folder, "m.hepta")
        run(f"{build}/logits_dump", path, ids, out)
        logits.append(np.fromfile(out, dtype="<f4"))
        warning = run(f"{build}/hepta", "quantize", path, "-o", packed, "--bits", "3.5", "-q",
                      "--tokenizer", tokenizer).stderr  # fmt: skip
        file = json.loads(run(f"{build}/hepta", "inspect", packed, "--json").stdout)
        hashes.append({t["name"]: t["sha256"] for t in file["tensors"]})
        source = file["metadata"].get("hepta.source.type")
        assert (source is None) == (path == second), f"hepta.source.type is {source}"
        assert ("was quantized before" in warning) == (path == first), f"the warning is {warning!r}"
        assert source is None or source in warning
    assert np.isfinite(logits[0]).all() and np.abs(logits[0]).max() > 0.01
    assert np.array_equal(logits[0].view("<u4"), logits[1].view("<u4")), "other logits than with F32 weights"
    assert hashes[0] == hashes[1], "quantized to other bytes than the same weights in F32"
    print(f"{os.path.basename(first)}: {logits[0].size} logits and {len(hashes[0])} quantized tensors as from F32")


def check_gguf(build):
    with tempfile.TemporaryDirectory() as folder:
        check_types(build, folder)
        quantized, plain = mixed_model(np.random.default_rng(3))
        paths = [os.path.join(folder, name) for name in ("mixed.gguf", "plain.gguf")]
        write_model(paths[0], quantized)
        write_model(paths[1], plain)
        check_same_model(build, folder, *paths)


# ---- GPTQ and AWQ ----------------------------------------------------------


def load_file(package, path):
    """A Python file of a package, without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None:
        print(f"SKIP: no package {package} (scripts/deps test installs it)")
        sys.exit(77)
    spec = importlib.util.spec_from_file_location("reference", os.path.join(os.path.dirname(found.origin), path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_words(rng, *shape):
    return torch.from_numpy(rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.int32))


def pack_rows(integers, bits):
    """Rows of integers as rows of 32-bit words, from the low bits on."""
    planes = (integers[:, :, None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(integers), -1)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little").view("<i4").copy())


def gptq_matrix(rng, reference, rows, cols, bits, size, act_order, v2, dtype):
    """The parts of a random matrix, and its weights (rows, cols) by AutoGPTQ."""
    layer = reference.QuantLinear(bits, size, cols, rows, bias=False)
    layer.qweight = random_words(rng, *layer.qweight.shape)
    stored = rng.integers(0, 2**bits - (1 if v2 else 0), tuple(layer.scales.shape))
    layer.qzeros = pack_rows(stored, bits)
    layer.scales = torch.from_numpy(rng.normal(0, 0.02, tuple(layer.scales.shape)).astype("f4")).to(dtype)
    if act_order:
        layer.g_idx = layer.g_idx[torch.from_numpy(rng.permutation(cols))]
    parts = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
    if v2:
        parts["qzeros"] = pack_rows(stored + 1, bits)
    layer.scales = layer.scales.float()
    with torch.no_grad():
        return parts, layer(torch.eye(cols)).T.contiguous()


def awq_matrix(rng, reference, rows, cols, size, dtype):
    size = cols if size == -1 else size
    parts = {"qweight": random_words(rng, cols, rows // 8), "qzeros": random_words(rng, cols // size, rows // 8)}
    scales = torch.from_numpy(rng.normal(0, 0.02, (cols // size, rows)).astype("f4")).to(dtype)
    weights = reference.dequantize_gemm(parts["qweight"], parts["qzeros"], scales.float(), 4, size)
    return {**parts, "scales": scales}, weights.T.contiguous()


HF_SHAPES = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
             "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256),
             "mlp.down_proj": (256, 512)}  # fmt: skip
GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}  # fmt: skip


def write_directory(path, tensors, quantization=None):
    os.makedirs(path, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
              "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64,
              "rms_norm_eps": 1e-5}  # fmt: skip
    if quantization is not None:
        config["quantization_config"] = quantization
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f)
    safetensors.torch.save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})


def check_directory(build, folder, name, quantization, matrix, biases=False, whole=False):
    """Every linear layer is quantized; `matrix` makes (parts, weights) of a shape. Counts weights."""
    rng = np.random.default_rng(5)

    def plain_tensor(*shape):
        return torch.from_numpy(rng.normal(0 if len(shape) > 1 else 1, 0.1, shape).astype("f4")).half()

    tensors = {"model.embed_tokens.weight": plain_tensor(32, 256), "model.norm.weight": plain_tensor(256),
               "lm_head.weight": plain_tensor(32, 256)}  # fmt: skip
    plain, expected = dict(tensors), {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"] = plain[f"model.layers.0.{norm}.weight"] = plain_tensor(256)
    for kind, shape in HF_SHAPES.items():
        parts, weights = matrix(rng, *shape)
        base = f"model.layers.0.{kind}"
        tensors.update({f"{base}.{suffix}": part.contiguous() for suffix, part in parts.items()})
        if biases:
            tensors[f"{base}.bias"] = torch.zeros(shape[0], dtype=torch.float16)
        plain[f"{base}.weight"] = weights
        expected[f"blk.0.{GGUF_NAMES[kind]}.weight"] = weights.numpy()
    paths = [os.path.join(folder, name), os.path.join(folder, name + "-plain")]
    write_directory(paths[0], tensors, quantization)
    write_directory(paths[1], plain)
    found, n = dump(build, paths[0], folder), 0
    for tensor, weights in expected.items():
        if not np.array_equal(found[tensor], weights):  # -0 equals 0: the reference multiplies matrices
            bad = tuple(np.argwhere(found[tensor] != weights)[0])
            sys.exit(f"{name}: {tensor}: weight {bad} is {found[tensor][bad]!r}, expected {weights[bad]!r}")
        n += weights.size
    if whole:
        check_same_model(build, folder, *paths)
    return n


def check_gptq(build):
    reference = load_file("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py")
    with tempfile.TemporaryDirectory() as folder:
        cases = [(bits, size, order, v2, dtype)
                 for bits in (2, 3, 4, 8) for size in (-1, 32, 64, 128) for order in (False, True)
                 for v2 in ((False, True) if size == 32 else (False,)) for dtype in (torch.float16,)]  # fmt: skip
        cases += [(4, 96, False, False, torch.float16), (4, 128, True, False, torch.bfloat16),
                  (4, 128, False, False, torch.float32)]  # fmt: skip
        n = 0
        for bits, size, order, v2, dtype in cases:
            name = f"gptq-{bits}-g{size}{'-act' if order else ''}{'-v2' if v2 else ''}-{str(dtype)[6:]}"
            config = {"bits": bits, "group_size": size, "desc_act": order, "damp_percent": 0.1, "sym": False,
                      "true_sequential": True, "quant_method": "gptq"}  # fmt: skip
            if v2:
                config["checkpoint_format"] = "gptq_v2"
            whole = bits == 4 and size == 128 and not v2

            def matrix(rng, rows, cols):
                parts, weights = gptq_matrix(rng, reference, rows, cols, bits, size, order, v2, dtype)
                if size == 64 and not order:
                    del parts["g_idx"]  # as files of older programs
                return parts, weights

            n += check_directory(build, folder, name, config, matrix, biases=size == 32, whole=whole)
        print(f"{len(cases)} layouts of GPTQ: {n} weights equal to AutoGPTQ's")


class LongIndices:
    """PyTorch 1.13 does not index by int32, which AutoAWQ does: ranges of int64 instead."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def arange(self, *args, **kwargs):
        return torch.arange(*args).long()


def check_awq(build):
    reference = load_file("awq", "utils/packing_utils.py")
    reference.torch = LongIndices()
    with tempfile.TemporaryDirectory() as folder:
        n = 0
        for size, dtype in [(-1, torch.float16), (32, torch.float16), (64, torch.bfloat16), (128, torch.float16)]:
            config = {"bits": 4, "group_size": size, "quant_method": "awq", "version": "gemm", "zero_point": True}
            name = f"awq-4-g{size}-{str(dtype)[6:]}"
            n += check_directory(build, folder, name, config, whole=size == 128,
                                 matrix=lambda rng, rows, cols: awq_matrix(rng, reference, rows, cols, size, dtype))  # fmt: skip
        print(f"4 layouts of AWQ: {n} weights equal to AutoAWQ's")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["gguf", "gptq", "awq", "golden"])
    parser.add_argument("--build", default="build")
    args = parser.parse_args()
    if args.what == "golden":
        golden()
    else:
        {"gguf": check_gguf, "gptq": check_gptq, "awq": check_awq}[args.what](args.build)


if __name__ == "__main__":
    main()
