#!/usr/bin/env python3
"""Checks tools/finetune against the engine.

    compare_finetune.py MODEL.hepta --build BUILD

Integers, scales and weights of MODEL and of random models of every rate: the same bits as the
engine's (BUILD/tensor_dump). With PyTorch also: logits, straight-through gradients, and that a short
fine-tuning gives a valid file that predicts its text better. Exit code 77 without numpy or torch.
"""

import argparse
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import torch
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools", "finetune")
sys.path.insert(0, FOLDER)
from hepta_file import HeptaFile, bfloat16_to_float, float_to_bfloat16  # noqa: E402
from llama import Llama  # noqa: E402
from packed_linear import PackedLinear, RoundActivations  # noqa: E402

SHAPE = "vocab=300,width=112,layers=2,heads=4,kv_heads=2,ff=72,context=64,tied=1"
TEXT = "Once upon a time there was a king who had three daughters. " * 20


def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def same(a, b):
    return a.shape == b.shape and np.array_equal(a.astype("<f4").view("<u4"), b.view("<u4"))


def check_values(build, path, folder):
    """Every tensor of a file, bit by bit; returns the rates seen."""
    out, expected, at = os.path.join(folder, "values"), {}, 0
    lines = run(f"{build}/tensor_dump", path, out).splitlines()
    values = np.fromfile(out, dtype="<f4")
    for name, rows, cols in (line.split() for line in lines):
        n = int(rows) * int(cols)
        expected[name] = values[at : at + n].reshape(int(rows), int(cols))
        at += n
    file = HeptaFile(path)
    for name, t in file.tensors.items():
        if t.half_bits:
            integers, scale = file.packed(name)
            assert same(integers, expected[name + ":integers"]), f"{path}: integers of {name}"
            assert same(scale[:, None], expected[name + ":scale"]), f"{path}: scales of {name}"
        weights = file.weights(name).reshape(expected[name].shape)
        assert same(weights, expected[name]), f"{path}: weights of {name}"
    copy = os.path.join(folder, "copy")
    file.save(copy)
    with open(path, "rb") as a, open(copy, "rb") as b:
        assert a.read() == b.read(), f"{path}: saving changes it"
    return {t.half_bits for t in file.tensors.values()} - {0}


def check_bfloat16():
    x = np.random.default_rng(1).standard_normal(10000).astype(np.float32)
    x[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0]  # ties go to even
    y = bfloat16_to_float(float_to_bfloat16(x))
    assert np.array_equal(y, torch.from_numpy(x).bfloat16().float().numpy())
    assert list(y[:4]) == [1, 1 + 2**-6, -1, 0]


def check_logits(build, model, folder):
    """Largest difference from the engine's logits, over their deviation."""
    tokens = np.random.default_rng(2).integers(3, 300, 40).astype("<i4")
    tokens[0] = 1
    ids, out = os.path.join(folder, "ids"), os.path.join(folder, "logits")
    tokens.tofile(ids)
    run(f"{build}/logits_dump", model, ids, out)
    expected = torch.from_numpy(np.fromfile(out, dtype="<f4").reshape(len(tokens), -1))
    with torch.no_grad():
        found = Llama(HeptaFile(model))(torch.tensor(tokens[None].astype(int)))[0]
    difference = ((found - expected).std() / expected.std()).item()
    assert difference < 0.02, difference  # the engine rounds activations to int8
    return difference


def check_gradients(model):
    """Forward the quantized weight, backward to latent weights and scales."""
    file = HeptaFile(model)
    name = "blk.1.ffn_down.weight"
    weights = torch.from_numpy(file.weights(name))
    torch.manual_seed(3)
    latent = torch.randn_like(weights)
    x, g = torch.randn(5, weights.shape[1]), torch.randn(5, weights.shape[0])
    layer = PackedLinear(file, name, latent)
    y = layer(x)
    assert torch.allclose(y, x @ weights.T, rtol=1e-4, atol=1e-5)
    y.backward(g)
    expected = g.T @ x
    assert torch.allclose(layer.latent.grad, expected, rtol=1e-4, atol=1e-5)
    by_scale = (expected * weights).sum(1) / layer.scale.detach()
    assert torch.allclose(layer.scale.grad, by_scale, rtol=1e-3, atol=1e-3)


def check_activations(model):
    """Inputs rounded to int8 as in docs/NUMERICS.md, gradients straight through."""
    file = HeptaFile(model)
    name = "blk.1.ffn_down.weight"
    columns = file.tensors[name].shape[1]
    x = torch.randn(5, columns, requires_grad=True)
    layer = PackedLinear(file, name, int8_activations=True)
    y = layer(x)
    integers, scale = file.packed(name)
    rotated = file.rotation(columns).rotate(x.detach().numpy())
    largest = abs(rotated).max(axis=1, keepdims=True)
    q = np.rint(rotated * (np.float32(127) / largest)).astype(int)
    expected = q @ integers[:, :columns].T.astype(int) * scale * (largest / 127)
    rounding = (x @ layer.weight().T).detach().numpy() - expected
    assert (y.detach().numpy() - expected).std() < 0.05 * rounding.std()  # a tie may fall either way
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.allclose(x.grad, g @ layer.weight().detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(RoundActivations.apply(torch.zeros(1, 4)), torch.zeros(1, 4))


def perplexity(hepta, model, text):
    return float(run(hepta, "perplexity", model, "-f", text, "-q").split()[1])


def check_training(build, model, folder):
    """A few steps on one text: a valid file, other scales and norms, the codes as they were."""
    hepta, text, out = f"{build}/hepta", os.path.join(folder, "text"), os.path.join(folder, "out.hepta")
    with open(text, "w", encoding="utf-8") as f:
        f.write(TEXT)
    command = [sys.executable, os.path.join(FOLDER, "finetune.py"), model, "-o", out, "--text", text]
    command += ["--steps", "12", "--batch", "2", "--window", "48", "--rate", "0.02", "--hepta", hepta]
    run(*command, "--threads", "1", "--int8")
    run(hepta, "verify", out, "-q")
    a, b = HeptaFile(model), HeptaFile(out)
    assert b.metadata["hepta.recipe"] == a.metadata["hepta.recipe"] + "; scales and norms fine-tuned, 12 steps"
    for name, t in a.tensors.items():
        if t.half_bits:
            assert np.array_equal(a.packed(name)[0], b.packed(name)[0]), name
            assert not np.array_equal(a.packed(name)[1], b.packed(name)[1]), name
        else:
            assert not np.array_equal(a.values(name), b.values(name)), name
    before, after = perplexity(hepta, model, text), perplexity(hepta, out, text)
    assert after < 0.8 * before, (before, after)
    b.copy_matrix("blk.0.attn_q.weight", a)
    assert np.array_equal(a.packed("blk.0.attn_q.weight")[1], b.packed("blk.0.attn_q.weight")[1])
    return before, after


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--build", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        check_values(args.build, args.model, folder)
        rates = set()
        for bits in ("2", "2.7", "3.2", "3.7", "4.2", "8"):
            path = os.path.join(folder, f"{bits}.hepta")
            run(f"{args.build}/hepta", "synth", "--shape", SHAPE, "-b", bits, "-q", "-o", path)
            rates |= check_values(args.build, path, folder)
        assert rates == {4, 5, 6, 7, 8, 16}, rates
        check_bfloat16()
        difference = check_logits(args.build, args.model, folder)
        check_gradients(args.model)
        check_activations(args.model)
        before, after = check_training(args.build, os.path.join(folder, "2.hepta"), folder)
    print(f"logits within {difference:.1e} of the engine's; perplexity {before:.0f} -> {after:.0f}")


if __name__ == "__main__":
    main()
