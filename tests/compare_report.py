#!/usr/bin/env python3
"""Checks `hepta report` against figures computed with NumPy and the gguf package.

    compare_report.py BASE.gguf --build build

Writes a Q4_0 version of BASE (an F16 GGUF), and compares errors, sizes, the inputs of the first
layer and the errors of its outputs; of a .hepta version it checks what must hold. Also parses the
page. Exit code 77 without numpy or gguf.
"""

import argparse
import html.parser
import json
import os
import subprocess
import sys
import tempfile

try:
    import gguf
    import numpy as np
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)

TOKENS = 90
TEXT = "Once upon a time there was a king who had three daughters, and the youngest of them sang. " * 20
VOID = {"meta", "br", "path", "circle", "rect"}  # and table cells, whose end tags HTML lets go
CELLS = {"th", "td"}


class Page(html.parser.HTMLParser):
    """Every tag is closed in order, nothing is loaded from elsewhere, no script."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not {"src", "href", "onload"} & {name for name, _ in attributes}, attributes
        if tag not in VOID | CELLS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID | CELLS:
            assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True).stdout


def write_q4_0(reader, path):
    """The same model, all matrices Q4_0; returns their values."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub)
    values = {}
    for t in reader.tensors:
        if len(t.shape) == 2:
            q = gguf.quants.quantize(t.data.astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
            values[t.name] = gguf.quants.dequantize(q, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(t.name, q, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(t.name, t.data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


class Check:
    worst = 0.0

    def same(self, name, found, expected, limit):
        difference = abs(found - expected) / abs(expected)
        self.worst = max(self.worst, difference)
        assert difference <= limit, f"{name}: {found}, expected {expected}"


def check_values(check, found, base, values, ids, eps):
    total = sum(v.size * 18 / 32 for v in values.values()) + sum(
        4 * v.size for n, v in base.items() if n not in values
    )
    assert {t["name"] for t in found["tensors"]} == set(values)
    for t in found["tensors"]:
        w, v = base[t["name"]], values[t["name"]].astype(np.float64)
        check.same(t["name"], t["error"], np.linalg.norm(v - w) / np.linalg.norm(w), 1e-7)
        check.same("share", t["share"], v.size * 18 / 32 / total, 1e-7)
        assert t["bits"] == 4.5 and t["type"] == "Q4_0", t
    x = base["token_embd.weight"][ids]
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * base["blk.0.attn_norm.weight"]
    spread = found["inputs"][0]["base"]
    assert found["inputs"][0]["rotated"] is None
    mean2, rms = (x * x).mean(), np.sqrt((x * x).mean(axis=1))
    check.same("min", spread["min"], x.min(), 1e-5)
    check.same("max", spread["max"], x.max(), 1e-5)
    check.same("rms", spread["rms"], np.sqrt(mean2), 1e-5)
    check.same("kurtosis", spread["kurtosis"], (x**4).mean() / mean2**2, 1e-5)
    check.same("peak", spread["peak"], (abs(x).max(axis=1) / rms).mean(), 1e-5)
    for t in found["tensors"][:3]:
        y, z = x @ base[t["name"]].T, x @ values[t["name"]].astype(np.float64).T
        check.same(t["name"], t["output_error"], np.linalg.norm(z - y) / np.linalg.norm(y), 1e-4)
        assert t["output_error_int8"] == t["output_error"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--build", required=True)
    args = parser.parse_args()
    hepta, check = f"{args.build}/hepta", Check()
    reader = gguf.GGUFReader(args.base)
    base = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    eps = reader.fields["llama.attention.layer_norm_rms_epsilon"].contents()
    with tempfile.TemporaryDirectory() as folder:
        q4, text = os.path.join(folder, "q4.gguf"), os.path.join(folder, "text")
        with open(text, "w", encoding="utf-8") as f:
            f.write(TEXT)
        values = write_q4_0(reader, q4)
        ids = [int(i) for i in run(hepta, "tokenize", args.base, "--bos", "-f", text).split()]
        report = [hepta, "report", args.base, "-f", text, "--limit", str(TOKENS), "--json", "-q"]
        found = json.loads(run(*report, q4))
        assert found["tokens"] == TOKENS
        check_values(check, found, base, values, ids[: TOKENS + 1], eps)

        # a .hepta file under a name that HTML must escape; what the rotation and the code promise
        odd = os.path.join(folder, "<b>&'\" \u00e9.hepta")
        run(hepta, "quantize", args.base, "-o", odd, "--bits", "8", "-q")
        page = os.path.join(folder, "page.html")
        found = json.loads(run(*report, odd, "-o", page, "-t", "1"))
        assert found == json.loads(run(*report, odd, "-t", "3")), "threads change the figures"
        for t in found["tensors"]:  # 8 bits: an error of about 4 / 127 / sqrt(12) of the weights
            assert 0.002 < t["error"] < 0.02, t
            assert t["error"] / 4 < t["output_error"] < t["output_error_int8"] < 0.03, t
        for i in found["inputs"]:
            check.same("rms", i["rotated"]["rms"], i["base"]["rms"], 1e-5)
            assert i["rotated"]["peak"] < 4.5, i
        with open(page, encoding="utf-8") as f:
            text = f.read()
        parser = Page()
        parser.feed(text)
        parser.close()
        assert parser.open == [] and "<b>" not in text and "http" not in text
        assert odd in "".join(parser.texts), "the name is not shown"
        assert {"svg", "path", "circle", "table"} <= parser.tags and "script" not in parser.tags
    print(f"{len(values)} tensors: largest relative difference {check.worst:.1e}")


if __name__ == "__main__":
    main()
