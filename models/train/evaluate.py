"""Measures a shipped folder: recall by distance, bits per character of unseen verses, the small tasks.

Usage: evaluate.py FOLDER [QUESTIONS]   (default 500)
Greedy decoding is judged with one forward pass: it gives the answer exactly when every token of it is the arg-max.
"""

import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import texts
from export import questions
from model import Llama
from samples import Sampler
from train import held_out


def load(folder):
    model = Llama()
    model.load_state_dict({n: w.float() for n, w in load_file(str(folder / "model.safetensors")).items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def chat(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def says(model, tokenizer, prompt, answer):
    """Whether greedy decoding after `prompt` begins with `answer`."""
    ids = tokenizer.encode(prompt).ids
    want = tokenizer.encode(answer).ids
    logits = model(torch.tensor([ids + want]))[0, len(ids) - 1 : -1]
    return logits.argmax(-1).tolist() == want


@torch.no_grad()
def complete(model, tokenizer, prompt, count):
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        following = model(torch.tensor([ids]))[0, -1].argmax().item()
        if following in (0, 2):
            break
        ids.append(following)
    return tokenizer.decode(ids, skip_special_tokens=False)


def recall(model, tokenizer, count):
    buckets = [(512, 700), (700, 900), (900, 1100), (1100, 1200), (1200, 1500), (1500, 1850)]
    shares = [5, 5, 5, 2, 2, 1]
    total, right_total = 0, 0
    for number, ((low, high), share) in enumerate(zip(buckets, shares)):
        asked = questions(tokenizer, 7000 + number, [random.Random(i).randrange(low + 25, high) for i in range(count * share // 20)])
        right = plain = longest = 0
        for i, q in enumerate(asked):
            user = q["messages"][0]["content"]
            longest = max(longest, len(tokenizer.encode(chat(user)).ids))
            right += says(model, tokenizer, chat(user), q["answer"] + ".")
            if i % 5 == 0:
                plain += says(model, tokenizer, user.replace("\n\nWhat", " What"), " " + q["answer"] + ".")
        print(f"recall {low}-{high}: chat {right}/{len(asked)}, plain {plain}/{len(asked[::5])}, longest prompt {longest}", flush=True)
        total, right_total = total + len(asked), right_total + right
    print(f"recall chat, all: {right_total}/{total} = {100 * right_total / total:.1f} %")


@torch.no_grad()
def bits_per_character(model, tokenizer):
    _, held = held_out(texts.verses())
    bits = characters = 0
    for at in range(0, len(held), 35):
        text = " ".join(held[at : at + 35])
        ids = torch.tensor([tokenizer.encode(text).ids])
        each = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")
        bits += each.item() / math.log(2)
        characters += len(text)
    return bits / characters


def tasks(model, tokenizer, count=200):
    made = {}
    sampler = Sampler(random.Random(99), tokenizer, held_out(texts.verses())[1], [])
    while sum(len(v) for v in made.values()) < count:
        asked, said = sampler.task()
        first = asked.split()[0]
        kind = first if first in ("Copy:", "Sort", "Add", "Close") else "small talk"
        made.setdefault(kind, []).append(says(model, tokenizer, chat(asked), said + "<|im_end|>"))
    for kind, results in sorted(made.items()):
        print(f"{kind}: {sum(results)}/{len(results)}")


def main():
    torch.set_num_threads(2)
    model, tokenizer = load(Path(sys.argv[1]))
    print(f"bits per character of unseen verses: {bits_per_character(model, tokenizer):.3f}")
    for prompt in ("In the beginning", "And the LORD said unto Moses,", chat("Who are you?"), chat("Hello, my friend!")):
        print(repr(complete(model, tokenizer, prompt, 60)))
    tasks(model, tokenizer)
    recall(model, tokenizer, int(sys.argv[2]) if len(sys.argv) > 2 else 500)


if __name__ == "__main__":
    main()
