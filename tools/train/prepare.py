"""Train the tokenizer and turn the corpus into token arrays.

Reads the corpus directory (train-*.txt, valid.txt, test.txt, SOURCES.tsv) and
writes to the work directory:

    tokenizer.model    SentencePiece BPE model, 4096 pieces
    train.npz          token arrays of the training documents, by tier
    valid.npz test.npz token arrays of the held-out documents
    valid.txt test.txt the held-out documents without the separator lines

Documents are separated by a line `<|endoftext|>`, which never becomes text:
each document is encoded as BOS, its pieces, EOS. The text itself is used as
it stands; it is already plain (straight quotes, "--" for dashes), and no
normalisation happens in the tokenizer, so perplexity is measured on the text
as given.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import sentencepiece as spm

SEPARATOR = "<|endoftext|>"
VOCAB_SIZE = 4096
BOS, EOS = 1, 2

# Which books are drawn more often during training. The model is meant to tell
# pleasant little stories, so fairy tales come first (tier 0), then stories and
# novels for children (tier 1), then everything else (tier 2).
FAIRY_TALES = {
    "Zuni Folktales", "The Blue Fairy Book", "The Red Fairy Book",
    "Fairy Tales", "On a Pincushion", "Japanese Fairy Tales",
    "Norwegian Folk Tales", "Fables", "Household Tales", "Indian Fairy Tales",
    "Children’s Stories", "Just So Stories",
    "George MacDonald: Short Fiction", "Beatrix Potter: Short Fiction",
}
CHILDRENS_BOOKS = {
    "The Merry Adventures of Robin Hood", "Black Beauty", "A Christmas Carol",
    "The Water-Babies", "Five Children and It", "The Enchanted Castle",
    "The Magic City", "The Phoenix and the Carpet", "The Story of the Amulet",
    "The Story of the Treasure Seekers", "Pollyanna", "A Little Princess",
    "The Secret Garden", "At the Back of the North Wind", "Phantastes",
    "The Princess and Curdie", "The Princess and the Goblin",
    "The Story of Doctor Dolittle", "The Voyages of Doctor Dolittle",
    "Peter and Wendy", "The Wind in the Willows",
    "Dorothy and the Wizard in Oz", "Ozma of Oz", "The Marvelous Land of Oz",
    "The Road to Oz", "The Wonderful Wizard of Oz", "Anne of Avonlea",
    "Anne of Green Gables", "Anne of the Island", "Emily of New Moon",
    "Alice’s Adventures in Wonderland", "Through the Looking-Glass",
    "Little Women", "The Adventures of Tom Sawyer",
    "The Prince and the Pauper", "The Jungle Book",
    "The Wonderful Adventures of Nils",
}
TIERS = 3


def tier_of(title, author):
    """Tier of a book: 0 fairy tales, 1 children's books, 2 the rest."""
    names = {title, f"{author}: {title}"}
    if names & FAIRY_TALES:
        return 0
    if names & CHILDRENS_BOOKS:
        return 1
    return 2


def read_documents(*paths):
    """The documents of some corpus files, in order."""
    documents = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").split(f"\n{SEPARATOR}"):
            text = text.strip("\n")
            if text:
                documents.append(text)
    return documents


def document_tiers(sources):
    """Tier of every training document, from the counts in SOURCES.tsv."""
    tiers = []
    with open(sources, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["split"] == "train":
                tier = tier_of(row["title"], row["author"])
                tiers += [tier] * int(row["documents"])
    return tiers


def without_title(text):
    """A document without its first line when that line is a heading, that
    is, when it is short and followed by an empty line; else None."""
    head, gap, body = text.partition("\n\n")
    if gap and "\n" not in head and len(head) < 120 and body.strip():
        return body.strip("\n")
    return None


def train_tokenizer(documents, threads):
    """Train on the lines of the documents; the SentencePiece model, as bytes."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=(
            line for text in documents for line in text.split("\n") if line
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=threads,
        minloglevel=1,
    )
    return model.getvalue()


def encode(tokenizer, texts):
    """Concatenated tokens of the texts, each as BOS ... EOS, and the offsets
    of the texts in them (one more than there are texts)."""
    pieces = tokenizer.encode(texts, add_bos=True, add_eos=True)
    offsets = np.cumsum([0] + [len(p) for p in pieces]).astype(np.int64)
    return np.concatenate([np.asarray(p, np.uint16) for p in pieces]), offsets


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=Path("../shared/data/corpus"))
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    documents = read_documents(*sorted(args.corpus.glob("train-*.txt")))
    tiers = document_tiers(args.corpus / "SOURCES.tsv")
    if len(documents) != len(tiers):
        raise SystemExit(
            f"{len(documents)} training documents, but SOURCES.tsv counts {len(tiers)}"
        )

    model = train_tokenizer(documents, args.threads)
    (args.work / "tokenizer.model").write_bytes(model)
    tokenizer = spm.SentencePieceProcessor(model_proto=model)

    # Every document is kept twice: as it stands, and without its heading, so
    # that the model can start a story with or without a title.
    arrays = {}
    for tier in range(TIERS):
        full = [d for d, t in zip(documents, tiers) if t == tier]
        bare = [without_title(d) or d for d in full]
        for kind, texts in (("full", full), ("bare", bare)):
            tokens, offsets = encode(tokenizer, texts)
            arrays[f"{kind}_tokens_{tier}"] = tokens
            arrays[f"{kind}_offsets_{tier}"] = offsets
        size = sum(len(d.encode()) for d in full)
        count = len(arrays[f"full_tokens_{tier}"])
        print(f"tier {tier}: {len(full)} documents, {size} bytes, {count} tokens")
    np.savez(args.work / "train.npz", **arrays)

    for split in ("valid", "test"):
        texts = read_documents(args.corpus / f"{split}.txt")
        tokens, offsets = encode(tokenizer, texts)
        size = sum(len(d.encode()) for d in texts)
        np.savez(args.work / f"{split}.npz", tokens=tokens, offsets=offsets, bytes=size)
        plain = "\n\n".join(texts) + "\n"
        (args.work / f"{split}.txt").write_text(plain, encoding="utf-8")
        print(f"{split}: {len(texts)} documents, {size} bytes, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
