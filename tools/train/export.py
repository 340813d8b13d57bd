"""Export a checkpoint of train.py.

Writes a Hugging Face directory (--hf) with F16 weights, and a GGUF file
(--gguf) with F16 matrices and F32 norm gains. See check.py for the checks of
what is written.
"""

import argparse
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import sentencepiece as spm
import torch
from safetensors.torch import save_file

NAME = "hepta-stories-7m"
DESCRIPTION = (
    "A small LLaMA-architecture model that tells stories, trained from scratch "
    "on public-domain English fairy tales, children's books and short fiction"
)
LICENSE = "mit"

# Hugging Face layer weights and their GGUF names.
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load_checkpoint(path):
    """Configuration (a dictionary) and F32 weights of a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state["config"], state["model"]


def hf_config(config):
    """The config.json of the Hugging Face directory."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["dim"],
        "intermediate_size": config["hidden_dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"],
        "head_dim": config["dim"] // config["n_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": config["context"],
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config["rope_theta"],
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "torch_dtype": "float16",
    }


def vocabulary(tokenizer):
    """Pieces, scores and GGUF token types of a SentencePiece model."""
    pieces, scores, types = [], [], []
    for i in range(tokenizer.vocab_size()):
        pieces.append(tokenizer.id_to_piece(i))
        scores.append(tokenizer.get_score(i))
        if tokenizer.is_unknown(i):
            types.append(gguf.TokenType.UNKNOWN)
        elif tokenizer.is_control(i):
            types.append(gguf.TokenType.CONTROL)
        elif tokenizer.is_byte(i):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.NORMAL)
    return pieces, scores, types


def merges(pieces, types):
    """The merge rules of a BPE vocabulary: every way to split a piece into
    two others, by the rank of the piece."""
    normal = {
        p: i for i, (p, t) in enumerate(zip(pieces, types))
        if t == gguf.TokenType.NORMAL
    }
    rules = []
    for piece in pieces:
        if piece not in normal:
            continue
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in normal and b in normal]
        rules += sorted(splits, key=lambda s: (normal[s[0]], normal[s[1]]))
    return rules


def tokenizer_json(tokenizer):
    """The SentencePiece model in the format of the `tokenizers` library."""
    pieces, _, types = vocabulary(tokenizer)
    special = [
        {
            "id": i, "content": pieces[i], "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for i in (0, 1, 2)
    ]
    bos, eos = pieces[1], pieces[2]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {p: i for i, p in enumerate(pieces)},
            "merges": [list(rule) for rule in merges(pieces, types)],
        },
    }


def write_json(path, value):
    path.write_text(
        json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def export_hf(directory, config, weights, tokenizer_path):
    """Write the Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.half().contiguous() for k, v in weights.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", hf_config(config))
    write_json(directory / "generation_config.json", {
        "bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.8,
    })
    shutil.copyfile(tokenizer_path, directory / "tokenizer.model")
    tokenizer = spm.SentencePieceProcessor(str(tokenizer_path))
    write_json(directory / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["context"],
    })


def interleave(weight, n_heads):
    """Reorder the rows of a query or key matrix from half-split rotary pairs
    (Hugging Face) to adjacent pairs (GGUF)."""
    rows, columns = weight.shape
    pairs = weight.reshape(n_heads, 2, rows // n_heads // 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def gguf_tensors(config, weights):
    """Names and arrays of the GGUF tensors. There is no output matrix: it is
    the token embedding."""
    for name, weight in weights.items():
        array = weight.float().numpy()
        parts = name.removesuffix(".weight").split(".")
        if parts[0] == "layers":
            kind = ".".join(parts[2:])
            if kind == "self_attn.q_proj":
                array = interleave(array, config["n_heads"])
            elif kind == "self_attn.k_proj":
                array = interleave(array, config["n_kv_heads"])
            out = f"blk.{parts[1]}.{GGUF_LAYER_NAMES[kind]}.weight"
        else:
            out = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[0]]
            out += ".weight"
        yield out, array.astype(np.float16 if array.ndim == 2 else np.float32)


def export_gguf(path, config, weights, tokenizer_path):
    """Write the GGUF file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license(LICENSE)
    writer.add_size_label("7M")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["context"])
    writer.add_embedding_length(config["dim"])
    writer.add_block_count(config["n_layers"])
    writer.add_feed_forward_length(config["hidden_dim"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(config["n_kv_heads"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["dim"] // config["n_heads"])

    tokenizer = spm.SentencePieceProcessor(str(tokenizer_path))
    pieces, scores, types = vocabulary(tokenizer)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)

    for name, array in gguf_tensors(config, weights):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--checkpoint", type=Path, help="default: WORK/checkpoint.pt")
    parser.add_argument("--hf", type=Path, help="Hugging Face directory to write")
    parser.add_argument("--gguf", type=Path, help="GGUF file to write")
    args = parser.parse_args()
    if not (args.hf or args.gguf):
        parser.error("nothing to write: give --hf, --gguf or both")

    config, weights = load_checkpoint(args.checkpoint or args.work / "checkpoint.pt")
    tokenizer_path = args.work / "tokenizer.model"
    if args.hf:
        export_hf(args.hf, config, weights, tokenizer_path)
    if args.gguf:
        export_gguf(args.gguf, config, weights, tokenizer_path)


if __name__ == "__main__":
    main()
