#!/usr/bin/env python3
"""Compares Hepta's tokenizers with sentencepiece and Hugging Face's tokenizers.

    compare_tokenizers.py --library build/libhepta.so --data DIR [--bytes N]

DIR holds tokenizers/ and text/ of the test data. Each tokenizer encodes N bytes of English and a
random text of many scripts, combining marks and kinds of white space; the ids must be the same.

- SentencePiece models: the sentencepiece package reads the same file.
- GPT-2, Qwen2.5, Llama 3: the tokenizers package gets vocabulary, merge rules and the published
  regular expressions; Llama 3's merge rules are derived here from its ranks.
- Every other way of cutting text that Hepta knows, and the ways in which SentencePiece models are
  written as tokenizer.json: a tokenizer.json that the tokenizers package writes, read by Hepta.

Exit code 1 if anything differs, 77 if the packages or the data are missing.
"""

import argparse
import base64
import ctypes
import json
import os
import random
import sys
import tempfile

try:
    import tokenizers
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)
try:
    import sentencepiece
except ImportError:
    sentencepiece = None

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
BOS, SPECIAL = 1, 2


def cased(contraction, digits):
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


class Hepta:
    """The public C API through ctypes."""

    class Error(ctypes.Structure):
        _fields_ = [("status", ctypes.c_int), ("message", ctypes.c_char * 512)]

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.hepta_tokenizer_open.argtypes = [ctypes.c_char_p, ctypes.c_char_p] + 2 * [ctypes.c_void_p]
        self.lib.hepta_tokenizer_encode.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p,
            ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]  # fmt: skip
        self.lib.hepta_tokenizer_free.argtypes = [ctypes.c_void_p]

    def encode(self, path, texts, flags=0):
        tokenizer, error = ctypes.c_void_p(), self.Error()
        if self.lib.hepta_tokenizer_open(None, path.encode(), ctypes.byref(tokenizer), ctypes.byref(error)):
            sys.exit(f"cannot open {path}: {error.message.decode()}")
        result = []
        for text in texts:
            data, n = text.encode(), ctypes.c_size_t()
            ids = (ctypes.c_int32 * (len(data) + 2))()
            if self.lib.hepta_tokenizer_encode(
                tokenizer, data, len(data), flags, ids, len(ids), ctypes.byref(n), ctypes.byref(error)
            ):
                sys.exit(f"cannot encode with {path}: {error.message.decode()}")
            result.append(list(ids[: n.value]))
        self.lib.hepta_tokenizer_free(tokenizer)
        return result


def mixed_text(n):
    """Words of many scripts, marks, digits of all kinds, white space. Not U+2581: it is a space."""
    pools = [(0x20, 0x7E)] * 6 + [
        (0xA0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F),
        (0xE00, 0xE7F), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x209F), (0x2100, 0x214F),
        (0x2160, 0x2188), (0x2190, 0x21FF), (0x2600, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x300, 0x36F), (0x660, 0x669), (0x10400, 0x1044F),
        (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF)]  # fmt: skip
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\n\n", " \n", "'s", "'LL", "'\u017f", "'Re", "\u3000",
              "\u180e", "\x85", "\u2028"]  # fmt: skip
    rng, out = random.Random(1), []
    while len(out) < n:
        low, high = rng.choice(pools)
        for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
            if rng.random() < 0.12:
                out.append(rng.choice(spaces))
            out.append(chr(rng.randint(low, high)))
    return "".join(out)


class Comparison:
    def __init__(self, hepta, texts):
        self.hepta, self.texts, self.failures = hepta, texts, 0

    def run(self, name, path, reference, flags=0):
        found = self.hepta.encode(path, self.texts, flags)
        expected = [reference(text) for text in self.texts]
        for a, b in zip(found, expected):
            if a != b:
                i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
                print(f"{name}: token {i} differs: {a[i:i + 5]}, expected {b[i:i + 5]}")
                self.failures += 1
                return
        print(f"{name}: {sum(map(len, found))} tokens are the same")

    def run_json(self, name, tokenizer, flags=0):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "tokenizer.json")
            tokenizer.save(path)
            self.run(name, path, lambda text: tokenizer.encode(text).ids, flags)


def byte_level(vocab, merges, steps, normalizer=None, ignore_merges=False):
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    t.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        t.normalizer = normalizer
    return t


def read_pair(vocab, merges):
    with open(vocab, encoding="utf-8") as f:
        ids = json.load(f)
    with open(merges, encoding="utf-8", newline="\n") as f:
        lines = [line.rstrip("\n") for line in f]
    return ids, [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def read_ranks(path):
    """Llama 3's ranks as a vocabulary in GPT-2's byte alphabet, with all the rules they imply."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in alphabet:
            alphabet[b] = chr(0x100 + len(alphabet) - len(printable))
    ranks = {}
    with open(path, "rb") as f:
        for line in f:
            token, rank = line.split()
            ranks["".join(alphabet[b] for b in base64.b64decode(token))] = int(rank)
    rules = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                rules.append((rank, ranks[token[:i]], ranks[token[i:]], token[:i], token[i:]))
    return ranks, [rule[3:] for rule in sorted(rules)]


def compare_byte_level(c, data):
    def isolate(regex):
        return pre_tokenizers.Split(Regex(regex), "isolated")

    gpt2 = read_pair(f"{data}/gpt2/gpt2_vocab.json", f"{data}/gpt2/gpt2_merges.txt")
    qwen = read_pair(f"{data}/qwen2.5/vocab.json", f"{data}/qwen2.5/merges.txt")
    tail = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)

    def encode(tokenizer):
        return lambda text: tokenizer.encode(text).ids

    c.run("gpt-2", f"{data}/gpt2", encode(byte_level(*gpt2, [gpt2_step])))
    c.run("qwen2", f"{data}/qwen2.5", encode(byte_level(*qwen, [isolate(QWEN2), tail], normalizers.NFC())))
    llama3 = byte_level(*read_ranks(f"{data}/llama3_tokenizer.model"), [isolate(LLAMA3), tail], None, True)
    c.run("llama 3", f"{data}/llama3_tokenizer.model", encode(llama3))
    deepseek = [isolate(r) for r in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN)]
    for name, pair, steps, ignore_merges in (
        ("llama-bpe", qwen, [isolate(LLAMA3), tail], True),
        ("gpt-4o", qwen, [isolate(cased(CONTRACTION, r"\p{N}{1,3}")), tail], False),
        ("tekken", qwen, [isolate(cased("", r"\p{N}")), tail], True),
        ("smollm", gpt2, [digits, gpt2_step], False),
        ("deepseek-coder", qwen, [*deepseek, digits, tail], False),
    ):
        c.run_json(name, byte_level(*pair, steps, None, ignore_merges))


def compare_sentencepiece(c, data):
    for name in ("llama2_tokenizer.model", "mistral/tokenizer.model.v1",
                 "mistral/mistral_instruct_tokenizer_240323.model.v3"):  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=f"{data}/{name}")
        c.run(name, f"{data}/{name}", model.encode)
    model = sentencepiece.SentencePieceProcessor(model_file=f"{data}/llama2_tokenizer.model")
    ids = range(model.get_piece_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    rules = []
    for piece, i in vocab.items():
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i)):
            for k in range(1, len(piece)):
                a, b = piece[:k], piece[k:]
                if a in vocab and b in vocab:
                    rules.append((-model.get_score(i), vocab[a], vocab[b], a, b))
    merges = [rule[3:] for rule in sorted(rules)]
    for name, normalizer, pre_tokenizer in (
        ("llama 2 as JSON, legacy",
         normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None),
        ("llama 2 as JSON, first", None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        ("llama 2 as JSON, split", None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
    ):  # fmt: skip
        t = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        t.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in ("<unk>", "<s>", "</s>")])
        t.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        if normalizer is not None:
            t.normalizer = normalizer
        if pre_tokenizer is not None:
            t.pre_tokenizer = pre_tokenizer
        c.run_json(name, t, BOS | SPECIAL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--bytes", type=int, default=200000)
    args = parser.parse_args()
    data = os.path.join(args.data, "tokenizers")
    text = os.path.join(args.data, "text", "wikitext-2", "wiki.test.raw")
    if not os.path.isdir(data) or not os.path.exists(text):
        print(f"SKIP: {data} or {text} is missing")
        sys.exit(77)
    with open(text, encoding="utf-8", newline="") as f:
        english = f.read()[: args.bytes]
    special = "  Hello</s>world <s> x</s></s> yes  </s>\n a  "
    c = Comparison(Hepta(os.path.abspath(args.library)), [english, mixed_text(args.bytes // 4), special, "", " "])
    if sentencepiece is not None:
        compare_sentencepiece(c, data)
    else:
        print("sentencepiece is missing: its models are not compared")
    compare_byte_level(c, data)
    sys.exit(1 if c.failures else 0)


if __name__ == "__main__":
    main()
