"""Writes the shipped files of baton-3m from a checkpoint: bf16 weights, configs and 60 recall questions.

Usage: export.py CHECKPOINT FOLDER   (FOLDER already holds the tokenizer)
"""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import texts
from model import CONFIG
from samples import Sampler, recall_question
from train import held_out

RECALL_SEED = 2024


def questions(tokenizer, seed, distances):
    """One fresh recall question for each distance, strewn among verses that were never trained on."""
    _, held = held_out(texts.verses())
    sampler = Sampler(random.Random(seed), tokenizer, held, [])
    count = lambda text: len(tokenizer.encode(text).ids)
    return [recall_question(sampler, count, distance) for distance in distances]


def main(checkpoint, folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = torch.load(checkpoint)["model"]
    weights = {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})

    bos, end, pad = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>", "<|pad|>"))
    config = CONFIG | {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": pad}
    generation = {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": pad, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    distances = [552 + i * 640 // 59 for i in range(60)]
    lines = [json.dumps(q) + "\n" for q in questions(tokenizer, RECALL_SEED, distances)]
    (folder / "recall.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
