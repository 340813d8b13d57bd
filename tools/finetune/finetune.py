#!/usr/bin/env python3
"""Fine-tunes what stays continuous in a .hepta file: row scales and norms, the codes as they are.

    finetune.py MODEL.hepta -o OUT.hepta --text TRAIN.txt --base MODEL-f16.gguf

The loss is the KL divergence of the next token from BASE's prediction, or, without --base, the
cross-entropy of the text. README.md has figures.
"""

import argparse
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from hepta_file import HeptaFile
from llama import Llama
from packed_linear import PackedLinear

SEPARATOR = b"<|endoftext|>\n"  # of documents, in the corpus of tools/train


def read_tokens(hepta, model, paths):
    """Tokens of the texts, one after the other, without the lines that separate documents."""
    text = b"".join(Path(path).read_bytes() for path in paths).replace(SEPARATOR, b"")
    command = [hepta, "tokenize", model]
    ids = subprocess.run(command, check=True, input=text, stdout=subprocess.PIPE).stdout.split()
    return torch.tensor([int(i) for i in ids])


def windows(tokens, bos, length, batch, generator):
    """A batch of windows from anywhere in the text, each beginning with BOS."""
    starts = torch.randint(len(tokens) - length + 2, (batch,), generator=generator)
    rows = [tokens[s : s + length - 1] for s in starts.tolist()]
    return torch.cat((torch.full((batch, 1), bos), torch.stack(rows)), dim=1)


def loss_of(model, base, tokens):
    logits = F.log_softmax(model(tokens).flatten(0, 1), dim=-1)
    if base is None:
        return F.nll_loss(logits.view(*tokens.shape, -1)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    with torch.no_grad():
        target = F.log_softmax(base(tokens).flatten(0, 1), dim=-1)
    return F.kl_div(logits, target, log_target=True, reduction="batchmean")


def train(model, base, tokens, bos, args):
    matrices = [m for m in model.matrices.values() if isinstance(m, PackedLinear)]
    # Scales are of any size: what is learned is a factor of each.
    factors = [torch.nn.Parameter(torch.zeros_like(m.scale)) for m in matrices]
    start = [m.scale.detach().clone() for m in matrices]
    norms = list(model.norms.values())
    optimiser = torch.optim.Adam(factors + norms, lr=args.rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(args.seed)
    began, mean = time.time(), None
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 10) * (1 - step / args.steps)
        for m, f, s in zip(matrices, factors, start):
            m.scale.data = s * torch.exp(f.data)
        optimiser.zero_grad()
        model.zero_grad()
        loss = loss_of(model, base, windows(tokens, bos, args.window, args.batch, generator))
        loss.backward()
        for m, f in zip(matrices, factors):
            f.grad = m.scale.grad * m.scale.data
        optimiser.step()
        mean = loss.item() if mean is None else 0.9 * mean + 0.1 * loss.item()
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}: loss {mean:.4f}, {time.time() - began:.0f} s", flush=True)
    for m, f, s in zip(matrices, factors, start):
        m.scale.data = s * torch.exp(f.data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="the .hepta file to start from")
    parser.add_argument("-o", "--output", required=True, help="the .hepta file to write")
    parser.add_argument("--text", nargs="+", required=True, help="plain text to train on")
    parser.add_argument("--base", help="the unquantized model, GGUF of F32, F16 or BF16")
    parser.add_argument("--hepta", default="build/hepta", help="the program (for its tokenizer)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--window", type=int, help="tokens of a window; default: the context")
    parser.add_argument("--rate", type=float, default=0.003, help="learning rate, of Adam")
    parser.add_argument("--int8", action="store_true", help="round activations as the engine does")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    file = HeptaFile(args.model)
    model = Llama(file, args.int8)
    base = Llama(HeptaFile(args.base)) if args.base else None
    args.window = args.window or min(model.context, 512)
    tokens = read_tokens(args.hepta, args.model, args.text)
    print(f"{len(tokens)} tokens to train on")
    train(model, base, tokens, file.metadata["tokenizer.ggml.bos_token_id"], args)
    for m in model.matrices.values():
        if isinstance(m, PackedLinear):
            file.set_scales(m.file_name, m.scale.detach().numpy())
    for name in file.tensors:
        if Llama.key(name) in model.norms:
            file.set_values(name, model.norms[Llama.key(name)].detach().numpy())
    recipe = file.metadata["hepta.recipe"]
    file.set_string("hepta.recipe", f"{recipe}; scales and norms fine-tuned, {args.steps} steps")
    file.save(args.output)


if __name__ == "__main__":
    main()
