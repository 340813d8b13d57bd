"""Train hepta-stories-7m from scratch.

Run prepare.py first. Hidden matrices are trained with Muon, embeddings and
norm gains with AdamW. The learning rate is a function of the share of the
budget that is used up, where the budget is a wall-clock time (--minutes) or a
number of steps (--steps): a linear warm-up, a stable phase, and a linear
decay to zero. With a wall-clock budget the run ends on time on a busy
machine, only with fewer tokens seen.

A checkpoint is written every few minutes and holds the position in the data,
so that an interrupted run continues with the same data in the same order.
"""

import argparse
import csv
import os
import time
from pathlib import Path

import numpy as np
import torch

from model import Config, Llama
from muon import Muon
from prepare import TIERS

# Shares of fairy tales, children's books and other books in the data, during
# most of the training and during the decay of the learning rate. Of the
# tokens in the corpus they make up 20 %, 29 % and 51 %.
MIX_STABLE = (0.28, 0.34, 0.38)
MIX_DECAY = (0.40, 0.40, 0.20)


class TierStream:
    """Endless stream of training windows from one tier of the corpus.

    Every epoch shuffles the documents, keeps or drops the heading of each
    with equal chance, joins them, and cuts the result into windows of
    context + 1 tokens (the last token of one is the first of the next), which
    are then shuffled in turn. All of it follows from the seed, the tier and
    the epoch, so (epoch, position) is the whole state.
    """

    def __init__(self, data, tier, context, seed):
        self.parts = {
            kind: (data[f"{kind}_tokens_{tier}"], data[f"{kind}_offsets_{tier}"])
            for kind in ("full", "bare")
        }
        self.tier, self.context, self.seed = tier, context, seed
        self.seek(0, 0)

    def seek(self, epoch, position):
        """Go to a window of an epoch."""
        self.epoch, self.position = epoch, position
        rng = np.random.default_rng((self.seed, self.tier, epoch))
        count = len(self.parts["full"][1]) - 1
        pieces = []
        for i in rng.permutation(count):
            tokens, offsets = self.parts["full" if rng.random() < 0.5 else "bare"]
            pieces.append(tokens[offsets[i] : offsets[i + 1]])
        self.tokens = np.concatenate(pieces)
        starts = np.arange(0, len(self.tokens) - self.context, self.context)
        self.starts = rng.permutation(starts)

    def next(self):
        """The next window, context + 1 tokens."""
        if self.position == len(self.starts):
            self.seek(self.epoch + 1, 0)
        start = self.starts[self.position]
        self.position += 1
        return self.tokens[start : start + self.context + 1]


class Batches:
    """Batches of windows drawn from the tiers in given shares."""

    def __init__(self, path, context, seed):
        with np.load(path) as data:
            self.streams = [TierStream(data, t, context, seed) for t in range(TIERS)]
        self.seed = seed

    def next(self, step, size, shares):
        """Inputs and targets of one step, each (size, context)."""
        rng = np.random.default_rng((self.seed, 1000, step))
        tiers = rng.choice(TIERS, size=size, p=shares)
        rows = np.stack([self.streams[t].next() for t in tiers]).astype(np.int64)
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]

    def state(self):
        return [(s.epoch, s.position) for s in self.streams]

    def restore(self, state):
        for stream, (epoch, position) in zip(self.streams, state):
            stream.seek(epoch, position)


def load_windows(path, context, limit=None):
    """Held-out text as inputs and targets, each (windows, context). With a
    limit, that many windows spread evenly over the text."""
    tokens = torch.from_numpy(np.load(path)["tokens"].astype(np.int64))
    count = (len(tokens) - 1) // context
    x = tokens[: count * context].view(count, context)
    y = tokens[1 : count * context + 1].view(count, context)
    if limit and limit < count:
        pick = torch.linspace(0, count - 1, limit).long()
        x, y = x[pick], y[pick]
    return x, y


def learning_rate(used, warmup, decay):
    """Factor on the peak learning rates when a share `used` of the budget is
    used up."""
    if used < warmup:
        return used / warmup
    return min(1.0, max(0.0, (1 - used) / decay))


def make_optimisers(model, args):
    """Muon for the matrices in the layers, AdamW for the rest."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if "_proj" in name else others).append(p)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim == 2]},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=args.adam_lr,
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=args.weight_decay,
    )
    if args.optimiser == "adamw":
        adam.add_param_group({"params": matrices})
        return [adam]
    return [adam, Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay)]


def save(path, state):
    """Write a checkpoint so that the file is always whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--checkpoint", type=Path, help="default: WORK/checkpoint.pt")
    parser.add_argument("--log", type=Path, help="CSV file; default: WORK/log.csv")
    parser.add_argument("--minutes", type=float, default=120, help="time budget")
    parser.add_argument("--steps", type=int, help="budget in steps instead of time")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--optimiser", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.01, help="share of the budget")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the budget")
    parser.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--log-steps", type=int, default=25)
    parser.add_argument("--valid-windows", type=int, default=48)
    args = parser.parse_args()
    checkpoint_path = args.checkpoint or args.work / "checkpoint.pt"
    log_path = args.log or args.work / "log.csv"
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    config = Config()
    model = Llama(config).to(device)
    forward = torch.compile(model) if args.compile else model
    optimisers = make_optimisers(model, args)
    batches = Batches(args.work / "train.npz", config.context, args.seed)
    valid = load_windows(args.work / "valid.npz", config.context, args.valid_windows)

    step, elapsed = 0, 0.0
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        batches.restore(state["data"])
        step, elapsed = state["step"], state["elapsed"]
        print(f"continuing at step {step}, {elapsed / 60:.1f} minutes", flush=True)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group.setdefault("peak", group["lr"])

    def loss_of(x, y):
        with torch.autocast(device.type, torch.bfloat16):
            return forward(x.to(device), y.to(device))

    @torch.no_grad()
    def valid_loss():
        parts = zip(*(t.split(args.micro_batch) for t in valid))
        losses = [loss_of(x, y).item() * len(x) for x, y in parts]
        return sum(losses) / len(valid[0])

    def log(loss, held_out=None):
        new = not log_path.exists()
        with open(log_path, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(
                    "step minutes tokens lr_factor train_loss valid_loss".split()
                )
            tokens = step * args.batch * config.context
            writer.writerow([
                step, f"{elapsed / 60:.2f}", tokens, f"{factor:.4f}", f"{loss:.4f}",
                "" if held_out is None else f"{held_out:.4f}",
            ])

    def checkpoint():
        save(checkpoint_path, {
            "config": config.to_dict(),
            "model": model.state_dict(),
            "optimisers": [o.state_dict() for o in optimisers],
            "data": batches.state(),
            "step": step,
            "elapsed": elapsed,
        })

    offset = time.monotonic() - elapsed
    saved_at, running, count, mean = elapsed, 0.0, 0, 0.0
    while True:
        used = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if used >= 1:
            break
        factor = max(learning_rate(used, args.warmup, args.decay), 1e-3)
        shares = MIX_DECAY if used > 1 - args.decay else MIX_STABLE
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = factor * group["peak"]

        x, y = batches.next(step, args.batch, shares)
        total = 0.0
        for mx, my in zip(x.split(args.micro_batch), y.split(args.micro_batch)):
            loss = loss_of(mx, my) * (len(mx) / args.batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        step += 1
        elapsed = time.monotonic() - offset
        running, count = running + total, count + 1
        due = elapsed - saved_at >= 60 * args.save_minutes
        if due or step % args.log_steps == 0:
            mean, running, count = running / count, 0.0, 0
            log(mean, valid_loss() if due else None)
        if due:
            checkpoint()
            saved_at = elapsed = time.monotonic() - offset

    log(running / count if count else mean, valid_loss())
    checkpoint()
    print(f"done: {step} steps, {elapsed / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
