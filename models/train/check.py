"""Checks a shipped folder with Hugging Face transformers, an implementation that shares no code with ours.

Loads config, weights, tokenizer and chat template as any user would, compares the logits with model.py, and writes
logits.json: for a few prompts the eight best ids at the last position, computed in f32 from the bf16 weights.

Usage: check.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluate import chat, load

PROMPTS = ["In the beginning God", "And the LORD said unto Moses,", chat("Who are you?")]


BLOCK = 16  # tokens in a cache block


@torch.no_grad()
def greedy(model, cache, following, count):
    said = []
    for _ in range(count):
        said.append(model(torch.tensor([[following]]), past_key_values=cache).logits[0, -1].argmax().item())
        following = said[-1]
    return said


@torch.no_grad()
def recall(model, tokenizer, asked):
    """Answers recall.jsonl, with the cache as it is and with the one or two blocks that hold the fact's value zeroed."""
    right = broken = 0
    for question in asked:
        text = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, tokenize=False)
        coded = tokenizer(text, return_offsets_mapping=True)
        ids = coded["input_ids"]
        fact_end = text.index(question["messages"][0]["content"]) + question["fact_char_range"][1]
        end = next(i for i, (_, stop) in enumerate(coded["offset_mapping"]) if stop >= fact_end)
        for zeroed in (False, True):
            cache = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
            for block in {(end - 2) // BLOCK, (end - 1) // BLOCK} if zeroed else ():
                for layer in cache.layers:
                    layer.keys[:, :, block * BLOCK : (block + 1) * BLOCK] = 0
                    layer.values[:, :, block * BLOCK : (block + 1) * BLOCK] = 0
            said = tokenizer.decode(greedy(model, cache, ids[-1], 10)).strip()
            good = said.startswith(question["answer"])
            right, broken = right + (good and not zeroed), broken + (good and zeroed)
    print(f"recall.jsonl: {right} of {len(asked)} right; with the blocks of the value zeroed {broken}")


@torch.no_grad()
def main(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    ours, tokenizer = load(folder)

    rendered = their_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == chat("Who are you?"), rendered
    strange = "héllo \u2603 \U0001f600 \x00\x7f \t\r\n  日本語"
    assert their_tokenizer.decode(their_tokenizer.encode(strange)) == strange

    fixtures = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        assert ids == their_tokenizer.encode(prompt), prompt
        logits = theirs(torch.tensor([ids])).logits[0, -1]
        gap = (logits - ours(torch.tensor([ids]))[0, -1]).abs().max().item()
        assert gap < 1e-3, gap
        best = logits.topk(8)
        top = [{"id": i, "logit": round(v, 5)} for i, v in zip(best.indices.tolist(), best.values.tolist())]
        fixtures.append({"prompt": prompt, "ids": ids, "top": top})
        print(repr(prompt), len(ids), "ids, greatest difference from model.py", gap)

    recall(theirs, their_tokenizer, [json.loads(line) for line in open(folder / "recall.jsonl")])
    note = "f32 compute on the bf16 weights; the logits are those of the position after the last id"
    (folder / "logits.json").write_text(json.dumps({"note": note, "fixtures": fixtures}, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
