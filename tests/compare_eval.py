#!/usr/bin/env python3
"""Checks `hepta eval` against prompts and log-likelihoods computed here.

    compare_eval.py MODEL --build build

Writes questions with all that CSV and JSON can hold, builds the prompts with Python's csv module,
computes every log-likelihood with NumPy from the raw logits (tests/logits_dump.c) of the tokens
(`hepta tokenize`), and compares them, and the counts of right answers. Needs numpy (exit code 77
without it).
"""

import argparse
import csv
import json
import os
import random
import re
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError as error:
    print(f"SKIP: {error}")
    sys.exit(77)

CTX = 448
WORDS = "once upon a time there was king queen little house forest bird sang and said to her".split()


class Model:
    def __init__(self, path, build, folder):
        self.path, self.build, self.folder = path, build, folder
        self.worst = 0.0

    def run(self, *arguments):
        command = [f"{self.build}/hepta", *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout.decode()

    def tokens(self, text):
        path = os.path.join(self.folder, "text")
        with open(path, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        return [int(i) for i in self.run("tokenize", self.path, "--bos", "-f", path).split()]

    def fits(self, context, continuation):
        return len(self.tokens(context + continuation)) - 1 <= CTX

    def log_likelihood(self, context, continuation):
        """Left-truncated to CTX positions, BOS kept; also the number of tokens wanted."""
        n = len(self.tokens(context))
        ids = self.tokens(context + continuation)
        tail, wanted = ids[n:], len(ids) - 1
        if wanted > CTX:
            ids = ids[:1] + ids[1 + wanted - CTX :]
        path, out = os.path.join(self.folder, "ids"), os.path.join(self.folder, "logits")
        np.array(ids[:-1], dtype="<i4").tofile(path)
        subprocess.run([f"{self.build}/logits_dump", self.path, path, out], check=True)
        x = np.fromfile(out, dtype="<f4").reshape(len(ids) - 1, -1).astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
        rows = np.arange(len(ids) - 1 - len(tail), len(ids) - 1)
        return x[rows, tail].sum(), wanted

    def compare(self, found, expected):
        difference = abs(found - expected) / abs(expected)
        self.worst = max(self.worst, difference)
        assert difference < 1e-7, f"log-likelihood {found}, expected {expected}"


def words(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write_mmlu(folder, rng):
    """Two subjects; quotes, commas, line breaks, CRLF, code points, one question that is too long."""
    odd = ['he said "no"', "a, b, c", "two\nlines", "x\r\ny", "é ü 中文", '"', "1.50", "  spaces  "]
    tables = {}
    for subject, end in (("high_school_fairy_tales", "\n"), ("birds", "\r\n")):
        for part, n in (("dev", 5), ("test", 7)):
            rows = []
            for i in range(n):
                question = words(rng, 5) + " " + odd[(i + n) % len(odd)] + "?"
                if part == "test" and i == 3:
                    question = words(rng, 200)
                if part == "test" and i == 4:
                    question = words(rng, 500)
                choices = [words(rng, 1) + odd[(i + j) % len(odd)] for j in range(4)]
                rows.append([question, *choices, "ABCD"[rng.randrange(4)]])
            os.makedirs(os.path.join(folder, part), exist_ok=True)
            path = os.path.join(folder, part, f"{subject}_{part}.csv")
            with open(path, "w", encoding="utf-8", newline="") as f:
                csv.writer(f, lineterminator=end).writerows(rows)
            tables[subject, part] = rows
    return tables


def mmlu_prompt(tables, subject, i, shots):
    def example(row):
        choices = "".join(f"\n{c}. {text}" for c, text in zip("ABCD", row[1:5]))
        return row[0] + choices + "\nAnswer:"

    text = "The following are multiple choice questions (with answers) about "
    text += "".join(" " + word for word in subject.split("_")) + ".\n\n"
    for row in tables[subject, "dev"][:shots]:
        text += example(row) + " " + row[5] + "\n\n"
    return text + example(tables[subject, "test"][i])


def check_mmlu(model):
    data = os.path.join(model.folder, "mmlu")
    tables = write_mmlu(data, random.Random(1))
    subjects = ["birds", "high_school_fairy_tales"]
    shown = [(s, i) for s in subjects for i in range(7)]
    for n, (subject, i) in enumerate(shown, 1):
        text = model.run("eval", "mmlu", data, "--show", str(n))
        assert text == mmlu_prompt(tables, subject, i, 5), f"prompt {n}: {text!r}"
    found = json.loads(model.run("eval", "mmlu", data, model.path, "--ctx", str(CTX), "--details", "-q"))
    fewer = truncated = 0
    right = {s: [] for s in subjects}
    for (subject, i), details in zip(shown, found["details"], strict=True):
        for shots in range(5, -1, -1):
            prompt = mmlu_prompt(tables, subject, i, shots)
            if model.fits(prompt, " A"):
                break
        scores = [model.log_likelihood(prompt, " " + c) for c in "ABCD"]
        fewer += shots < 5
        truncated += scores[0][1] > CTX
        for got, (value, _) in zip(details["log_p"], scores, strict=True):
            model.compare(got, value)
        answer = "ABCD"[int(np.argmax([s for s, _ in scores]))]
        right[subject].append(answer == tables[subject, "test"][i][5])
    assert 0 < truncated < fewer < 14, (truncated, fewer)
    assert (found["fewer_shots"], found["truncated"]) == (fewer, truncated), (fewer, truncated)
    every = np.array(sum(right.values(), []), dtype=float)
    means = [np.mean(r) for r in right.values()]
    errors = [np.std(r, ddof=0) / np.sqrt(len(r) - 1) for r in right.values()]
    for got, value in [
        (found["micro"]["accuracy"], every.mean()),
        (found["micro"]["standard_error"], every.std() / np.sqrt(len(every) - 1)),
        (found["macro"]["accuracy"], np.mean(means)),
        (found["macro"]["standard_error"], np.sqrt(np.square(errors).sum()) / 2),
        *((found["subjects"][s]["accuracy"], np.mean(right[s])) for s in subjects),
    ]:
        assert abs(got - value) < 1e-8, (got, value)
    return len(every)


def clean(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def check_hellaswag(model):
    rng = random.Random(2)
    items = []
    for i in range(10):
        endings = [words(rng, 3 + 4 * j) + ["", " [step] she", " ü é", " [title] then  two"][j] for j in range(4)]
        rng.shuffle(endings)
        item = {"endings": endings, "label": rng.randrange(4)}
        if i % 2 == 0:
            b = ["she", "éLAN vital [substeps]", "", "THE king", "x"][i // 2]
            item.update(activity_label="Telling a Tale", ctx_a=words(rng, 12) + " [header] Go.", ctx_b=b)
            item["label"] = str(item["label"])
            context = clean(f"{item['activity_label']}: {item['ctx_a']} {b.capitalize()}")
            choices = [clean(e) for e in endings]
        else:
            item["ctx"] = context = words(rng, 500 if i == 5 else 12) + " [kept]"
            choices = endings
        items.append((item, context, choices))
    path = os.path.join(model.folder, "h.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        f.write("".join(json.dumps(item, ensure_ascii=i % 3 == 0) + "\n" for i, (item, _, _) in enumerate(items)))
        f.write(" \n")
    found = json.loads(model.run("eval", "hellaswag", path, model.path, "--ctx", str(CTX), "--details", "-q"))
    right = right_norm = truncated = 0
    for (item, context, choices), details in zip(items, found["details"], strict=True):
        label = int(item["label"])
        scores = [model.log_likelihood(context, " " + c) for c in choices]
        if max(n for _, n in scores) > CTX:
            truncated += 1  # to the length of the longest ending: figures differ, checked elsewhere
            right += int(np.argmax(details["log_p"])) == label
            values = details["log_p"]
        else:
            for got, (value, _) in zip(details["log_p"], scores, strict=True):
                model.compare(got, value)
            values = [s for s, _ in scores]
            right += int(np.argmax(values)) == label
        right_norm += int(np.argmax([v / len(c) for v, c in zip(values, choices)])) == label
    assert truncated == 1 == found["truncated"]
    assert abs(found["acc"]["accuracy"] - right / 10) < 1e-8
    assert abs(found["acc_norm"]["accuracy"] - right_norm / 10) < 1e-8
    return len(items)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--build", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Model(args.model, args.build, folder)
        n = [check_mmlu(model), check_hellaswag(model)]
    print(f"{n[0]} questions of MMLU, {n[1]} items: largest relative difference {model.worst:.1e}")


if __name__ == "__main__":
    main()
