"""Check exported files against the checkpoint they come from.

- logits of the Hugging Face directory, run by transformers in F32, against
  those of our own model with the same F16-rounded weights
- tokenizer.json against tokenizer.model on the held-out text
- every tensor of the GGUF file, with the rotary order undone
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
import sentencepiece as spm
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from export import gguf_tensors, load_checkpoint
from model import Config, Llama
from prepare import read_documents


def check_logits(directory, config, weights, tokens):
    """Largest difference of the logits, ours against transformers'."""
    ours = Llama(Config(**config))
    ours.load_state_dict({k: v.half().float() for k, v in weights.items()})
    theirs = LlamaForCausalLM.from_pretrained(directory).float()
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    return (a - b).abs().max().item(), a.abs().max().item()


def check_tokenizer(directory, sentencepiece, documents):
    """Number of documents on which the two tokenizers disagree, either in
    the tokens or in the text that they decode to."""
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    wrong = 0
    for text in documents:
        tokens = sentencepiece.encode(text, add_bos=True)
        same = fast.encode(text).ids == tokens
        wrong += not (same and fast.decode(tokens) == sentencepiece.decode(tokens))
    return wrong


def check_gguf(path, config, weights):
    """Number of tensors; raises if one is missing, extra or different."""
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    expected = dict(gguf_tensors(config, weights))
    assert stored.keys() == expected.keys(), stored.keys() ^ expected.keys()
    for name, array in expected.items():
        assert np.array_equal(stored[name].data.reshape(array.shape), array), name
    # Rotating adjacent rows must agree with rotating the two halves of a head.
    half = config["dim"] // config["n_heads"] // 2
    for layer in range(config["n_layers"]):
        for kind in ("q", "k"):
            ours = weights[f"layers.{layer}.self_attn.{kind}_proj.weight"].half()
            file = torch.from_numpy(
                np.array(stored[f"blk.{layer}.attn_{kind}.weight"].data)
            )
            for head in range(len(ours) // (2 * half)):
                a = ours[head * 2 * half : (head + 1) * 2 * half]
                b = file[head * 2 * half : (head + 1) * 2 * half]
                assert torch.equal(b[0::2], a[:half])
                assert torch.equal(b[1::2], a[half:])
    return len(stored)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=Path("../shared/data/corpus"))
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--checkpoint", type=Path, help="default: WORK/checkpoint.pt")
    parser.add_argument("--hf", type=Path, help="Hugging Face directory to check")
    parser.add_argument("--gguf", type=Path, help="GGUF file to check")
    args = parser.parse_args()
    torch.set_num_threads(1)

    config, weights = load_checkpoint(args.checkpoint or args.work / "checkpoint.pt")
    sentencepiece = spm.SentencePieceProcessor(str(args.work / "tokenizer.model"))
    documents = read_documents(args.corpus / "valid.txt", args.corpus / "test.txt")
    documents += ["", " ", "  two  spaces ", "\n\nA\tB\r\n", "Ünïcödé → 日本 🙂 £5 12345"]
    failed = False
    if args.hf:
        tokens = sentencepiece.encode(documents[0], add_bos=True)[: config["context"]]
        difference, largest = check_logits(
            args.hf, config, weights, torch.tensor([tokens])
        )
        print(f"logits: largest difference {difference:.2e} (largest logit {largest:.1f})")
        wrong = check_tokenizer(args.hf, sentencepiece, documents)
        print(f"tokenizer.json: {wrong} of {len(documents)} texts differ")
        failed |= difference > 1e-3 or wrong > 0
    if args.gguf:
        print(f"GGUF: {check_gguf(args.gguf, config, weights)} tensors agree")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
