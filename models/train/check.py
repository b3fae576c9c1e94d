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

    for line in list(open(folder / "recall.jsonl"))[::12]:
        asked = json.loads(line)
        ids = their_tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = theirs.generate(**ids, max_new_tokens=16, do_sample=False)
        said = their_tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        print("right" if said.strip().startswith(asked["answer"]) else "WRONG", "|", asked["answer"], "|", said)

    note = "f32 compute on the bf16 weights; the logits are those of the position after the last id"
    (folder / "logits.json").write_text(json.dumps({"note": note, "fixtures": fixtures}, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
