#!/usr/bin/env python3
"""Checks `hepta perplexity --kl-from` against a computation in NumPy from the raw logits.

    compare_divergence.py MODEL BASE TEXT --build build [--ctx N] [--stride N] [--limit N]

The windows, the log-softmax (binary64), and every figure are computed here anew; the logits come
from tests/logits_dump.c, the token ids from `hepta tokenize`. Prints the largest relative
difference of a figure; exit code 1 if it exceeds 1e-7 (the JSON has nine digits). Needs numpy
(exit code 77 without it).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True).stdout


def log_softmax(model, ids, args):
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = os.path.join(folder, "ids"), os.path.join(folder, "logits")
        np.array(ids, dtype="<i4").tofile(tokens)
        run(f"{args.build}/logits_dump", model, tokens, out)
        x = np.fromfile(out, dtype="<f4").reshape(len(ids), -1).astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def windows(text, bos, ctx, stride):
    """Yields (ids of a window, index in it of the first token to score)."""
    room, done, start = ctx - len(bos), 1 - len(bos), 0
    while done < len(text):
        end = min(start + room, len(text))
        yield bos + text[start:end], done - start + len(bos)
        done, start = end, start + stride


def mean(x):
    return [x.mean(), x.std(ddof=1) / np.sqrt(len(x))]


def expected(args):
    tokenize = [f"{args.build}/hepta", "tokenize", args.model, "-f"]
    text = [int(i) for i in run(*tokenize, args.text).split()][: args.limit]
    bos = [int(i) for i in run(*tokenize, "/dev/null", "--bos").split()]
    nll, base_nll, kl, same = [], [], [], []
    for ids, first in windows(text, bos, args.ctx, args.stride):
        q = log_softmax(args.model, ids, args)[first - 1 : -1]
        p = log_softmax(args.base, ids, args)[first - 1 : -1]
        rows, true = np.arange(len(q)), np.array(ids[first:])
        nll.extend(-q[rows, true])
        base_nll.extend(-p[rows, true])
        kl.extend((np.exp(p) * (p - q)).sum(axis=1))
        same.extend(q.argmax(axis=1) == p.argmax(axis=1))
    nll, base_nll, kl, same = (np.array(x) for x in (nll, base_nll, kl, same))
    change = np.exp(-nll) - np.exp(-base_nll)
    ratio = mean(nll - base_nll)
    square = mean(change**2)
    result = {"tokens": len(nll), "mean_nll": nll.mean(), "perplexity": np.exp(nll.mean())}
    result["standard_error"] = mean(nll)[1] * result["perplexity"]
    result["base.perplexity"] = np.exp(base_nll.mean())
    result["base.standard_error"] = mean(base_nll)[1] * result["base.perplexity"]
    result["perplexity_ratio.value"] = np.exp(ratio[0])
    result["perplexity_ratio.standard_error"] = np.exp(ratio[0]) * ratio[1]
    result["kl.mean"], result["kl.standard_error"] = mean(kl)
    for name, q in {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9, "max": 100}.items():
        result["kl." + name] = np.percentile(kl, q)
    result["same_top.share"], result["same_top.standard_error"] = mean(same.astype(np.float64))
    result["probability_rms_change.value"] = np.sqrt(square[0])
    result["probability_rms_change.standard_error"] = square[1] / (2 * np.sqrt(square[0]))
    m = mean(change)
    result["probability_mean_change.value"], result["probability_mean_change.standard_error"] = m
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "base", "text"):
        parser.add_argument(name)
    parser.add_argument("--build", required=True)
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--stride", type=int, default=50)
    parser.add_argument("--limit", type=int, default=700)
    args = parser.parse_args()
    found = json.loads(
        run(f"{args.build}/hepta", "perplexity", args.model, "--kl-from", args.base, "-f", args.text,
            "--ctx", str(args.ctx), "--stride", str(args.stride), "--limit", str(args.limit),
            "--json", "-q")
    )  # fmt: skip
    worst = 0.0
    for name, value in expected(args).items():
        part, _, rest = name.partition(".")
        got = found[part] if rest == "" else found[part][rest]
        difference = abs(got - value) / abs(value)
        worst = max(worst, difference)
        if difference > 1e-7:
            print(f"{name}: {got}, expected {value}")
    print(f"{found['tokens']} tokens: largest relative difference {worst:.1e}")
    return 0 if worst <= 1e-7 else 1


if __name__ == "__main__":
    sys.exit(main())
