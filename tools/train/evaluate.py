"""Measure perplexity on held-out text and write sample stories.

Perplexity follows the protocol of `hepta perplexity`: the text is encoded as
a whole; windows of `context` positions start every `stride` tokens (default:
half the context), and each begins with BOS. Every token is scored exactly
once, in the first window that holds it, so that all but the first `stride`
have at least context - stride - 1 tokens before them. The weights are rounded
to F16, as they are exported, and the arithmetic is F32.
"""

import argparse
import math
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F

from export import load_checkpoint
from model import Config, Llama
from prepare import BOS, EOS


def load_model(checkpoint):
    """The model of a checkpoint with F16-rounded weights, in F32."""
    config, weights = load_checkpoint(checkpoint)
    model = Llama(Config(**config))
    model.load_state_dict({k: v.half().float() for k, v in weights.items()})
    return model.eval()


@torch.no_grad()
def negative_log_likelihoods(model, tokens, stride):
    """-ln p of every token of a text, given what its window holds before it."""
    room = model.config.context - 1
    losses, scored, start = [], 0, 0
    while scored < len(tokens):
        window = torch.tensor([[BOS, *tokens[start : start + room]]])
        logits = model(window[:, :-1])[0]
        nll = F.cross_entropy(logits, window[0, 1:], reduction="none")
        losses.append(nll[scored - start :].double())
        scored = start + window.shape[1] - 1
        start += stride
    return torch.cat(losses)


def perplexity(model, tokenizer, path, stride):
    """Print the perplexity of a text file."""
    text = path.read_text(encoding="utf-8")
    nll = negative_log_likelihoods(model, tokenizer.encode(text), stride)
    mean, error = nll.mean().item(), nll.std().item() / math.sqrt(len(nll))
    bits_per_byte = nll.sum().item() / math.log(2) / len(text.encode())
    print(
        f"{path.name}: perplexity {math.exp(mean):.4f} +- {math.exp(mean) * error:.4f} "
        f"({len(nll)} tokens, {mean:.4f} nats/token, {bits_per_byte:.4f} bits/byte)",
        flush=True,
    )


@torch.no_grad()
def story(model, tokenizer, prompt, temperature, length, generator):
    """A sampled continuation of the prompt, until EOS or the length."""
    tokens = [BOS] + tokenizer.encode(prompt)
    while len(tokens) < min(length, model.config.context):
        logits = model(torch.tensor([tokens]))[0, -1]
        p = F.softmax(logits / temperature, dim=-1)
        token = torch.multinomial(p, 1, generator=generator).item()
        if token == EOS:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--checkpoint", type=Path, help="default: WORK/checkpoint.pt")
    parser.add_argument(
        "--text", type=Path, nargs="*",
        help="text files to measure; default: WORK/valid.txt WORK/test.txt",
    )
    parser.add_argument("--stride", type=int, help="default: half the context")
    parser.add_argument("--prompt", action="append", help="start of a sample story")
    parser.add_argument("--samples", type=int, default=1, help="stories per prompt")
    parser.add_argument("--length", type=int, default=300, help="tokens per story")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = load_model(args.checkpoint or args.work / "checkpoint.pt")
    tokenizer = spm.SentencePieceProcessor(str(args.work / "tokenizer.model"))
    texts = args.text
    if texts is None:
        texts = [args.work / "valid.txt", args.work / "test.txt"]
    for path in texts:
        perplexity(model, tokenizer, path, args.stride or model.config.context // 2)
    for prompt in args.prompt or []:
        for seed in range(args.seed, args.seed + args.samples):
            generator = torch.Generator().manual_seed(seed)
            text = story(
                model, tokenizer, prompt, args.temperature, args.length, generator
            )
            print(f"\n--- seed {seed}\n{text}", flush=True)


if __name__ == "__main__":
    main()
