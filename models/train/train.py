"""Trains baton-3m on the CPU. Usage: train.py CHECKPOINT --tokenizer FILE (--tokens N | --minutes N)

Under torchrun each process uses one core and they meet once a step: on a busy machine that waits less than threads do.
The lengths grow with progress, from 512 tokens to 2,048.
"""

import argparse
import os
import random
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer

import texts
from lookback import center, plant
from model import Llama
from samples import END, KEY, KNOWN, TEXT, Sampler

PAD = "<|pad|>"

# Up to this progress: (sequence tokens, sequences in a step, share of streams)
LESSONS = [(0.5, 512, 4, 0.08), (0.75, 1024, 2, 0.05), (1.01, 1536, 2, 0.05)]
LONG = (2048, 1)  # one step in eight of the last lesson
MATRIX_RATE, PLANTED_RATE, EMBED_RATE = 0.015, 0.002, 1e-3
PLANTED = ("model.layers.0.", "model.layers.1.self_attn")  # what lookback.py set learns slowly, or it would be lost


def held_out(verses):
    """Splits the verses: two in a hundred, in runs of 100, are never trained on."""
    held = [v for i, v in enumerate(verses) if i // 100 % 50 == 7]
    return [v for i, v in enumerate(verses) if i // 100 % 50 != 7], held


class Batches:
    def __init__(self, sampler, tokenizer):
        self.sampler, self.tokenizer = sampler, tokenizer
        self.pad = tokenizer.token_to_id(PAD)

    def row(self, tokens, stream_share):
        """Ids and weights of tokens + 1 positions: one sample, then plain text up to the end."""
        r = self.sampler.random
        parts = [(END, 0.0)] if r.random() < 0.3 else []
        parts += self.sampler.sample(tokens, stream_share)
        parts += [(END, 0.3)] + self.sampler.text(40)
        text = "".join(p for p, _ in parts)
        char_weight = np.concatenate([np.full(len(p), w, np.float32) for p, w in parts])
        coded = self.tokenizer.encode(text)
        ids = coded.ids[: tokens + 1]
        weights = [char_weight[end - 1] for _, end in coded.offsets[: tokens + 1]]
        fill = tokens + 1 - len(ids)
        return ids + [self.pad] * fill, weights + [0.0] * fill

    def batch(self, tokens, rows, stream_share):
        made = [self.row(tokens, stream_share) for _ in range(rows)]
        ids = torch.tensor([ids for ids, _ in made])
        weights = torch.tensor(np.array([w for _, w in made], dtype=np.float32))
        return ids[:, :-1], ids[:, 1:], weights[:, 1:]


class Muon:
    """Momentum whose step is made orthogonal (Newton-Schulz), for the matrices; equal shapes go together."""

    def __init__(self, params):
        self.groups = {}
        for p in params:
            self.groups.setdefault(tuple(sorted(p.shape)), []).append(p)
        self.moment = {p: torch.zeros_like(p) for p in params}

    def state(self):
        return [self.moment[p] for ps in self.groups.values() for p in ps]

    @torch.no_grad()
    def step(self, rate, decay=0.01, momentum=0.95):
        for ps in self.groups.values():
            moves = []
            for p in ps:
                m = self.moment[p].lerp_(p.grad, 1 - momentum)
                move = p.grad.lerp(m, momentum)
                moves.append(move.T if move.shape[0] > move.shape[1] else move)
            for p, move in zip(ps, orthogonal(torch.stack(moves))):
                rows, columns = p.shape
                move = move.T if rows > columns else move
                p.mul_(1 - rate * decay).add_(move, alpha=-rate * max(1, rows / columns) ** 0.5)


def orthogonal(x, steps=5):
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def share_gradients(model):
    """Each process's gradients become the mean of all."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def same_progress(progress):
    told = torch.tensor([progress], dtype=torch.float64)
    dist.broadcast(told, 0)
    return told.item()


def rate_at(progress):
    """Warm-up, a plateau, then straight down to 3 %."""
    if progress < 0.05:
        return 0.05 + 0.95 * progress / 0.05
    return min(1.0, max(0.03, (1.0 - progress) / 0.5))


def lesson_at(progress, step):
    for until, tokens, rows, stream in LESSONS:
        if progress < until:
            last = until > 1
            return (*LONG, stream) if last and step % 8 == 0 else (tokens, rows, stream)


class Optimizer:
    """Muon for the matrices, slowly for the planted ones; Adam for the embedding and the norms."""

    def __init__(self, model):
        named = list(model.named_parameters())
        matrices = [(n, p) for n, p in named if p.dim() == 2 and "embed" not in n]
        self.fast = Muon([p for n, p in matrices if not n.startswith(PLANTED)])
        self.slow = Muon([p for n, p in matrices if n.startswith(PLANTED)])
        self.others = [p for n, p in named if p.dim() < 2 or "embed" in n]
        self.adam = torch.optim.AdamW(self.others, lr=EMBED_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.embed = model.model.embed_tokens.weight

    def step(self, rate):
        self.embed.grad[:, -1] = 0  # the constant direction stays
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.fast.step(MATRIX_RATE * rate)
        self.slow.step(PLANTED_RATE * rate)
        for group in self.adam.param_groups:
            group["lr"] = EMBED_RATE * rate
        self.adam.step()
        center(self.embed)

    def state(self):
        return {"adam": self.adam.state_dict(), "muon": self.fast.state() + self.slow.state()}

    def load(self, saved):
        self.adam.load_state_dict(saved["adam"])
        for mine, theirs in zip(self.fast.state() + self.slow.state(), saved["muon"]):
            mine.copy_(theirs)


@torch.no_grad()
def figures(each, weights, logits, targets):
    """What the log shows: losses of all and of plain text, and how many keys and values were foreseen."""
    right = (logits.argmax(-1) == targets).float()
    return {
        "loss": (each * weights).sum().item() / weights.sum().item(),
        "text": each[weights == TEXT].mean().item(),
        "key": right[weights == KEY].mean().item(),
        "value": right[weights == KNOWN].mean().item(),
    }


def arguments():
    args = argparse.ArgumentParser()
    args.add_argument("checkpoint")
    args.add_argument("--tokenizer", required=True)
    args.add_argument("--tokens", type=float, default=0)
    args.add_argument("--minutes", type=float, default=0)
    args.add_argument("--resume", help="a checkpoint to go on from")
    args.add_argument("--begin", type=float, default=0.0, help="progress to go on from, below 1")
    args.add_argument("--seed", type=int, default=1)
    return args.parse_args()


def main():
    a = arguments()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(1 if world > 1 else 2)
    torch.manual_seed(a.seed)

    tokenizer = Tokenizer.from_file(a.tokenizer)
    verses, _ = held_out(texts.verses())
    batches = Batches(Sampler(random.Random(a.seed * 1000 + rank), tokenizer, verses, texts.devil()), tokenizer)
    model = Llama()
    plant(model, tokenizer, a.seed)
    optimizer = Optimizer(model)
    if a.resume:
        saved = torch.load(a.resume)
        model.load_state_dict(saved["model"])
        optimizer.load(saved)

    begin = saved_at = time.time()
    seen, step, progress, shown = 0, 0, a.begin, []
    while progress < 1.0:
        tokens, rows, stream = lesson_at(progress, step)
        ids, targets, weights = batches.batch(tokens, max(1, rows // world), stream)
        logits = model(ids)
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        ((each * weights).sum() / weights.sum()).backward()
        if world > 1:
            share_gradients(model)
        optimizer.step(rate_at(progress))
        model.zero_grad()

        step, seen, spent = step + 1, seen + ids.numel() * world, time.time() - begin
        gone = seen / a.tokens if a.tokens else spent / 60 / a.minutes
        progress = a.begin + (1 - a.begin) * gone
        if world > 1:
            progress = same_progress(progress)
        shown.append(figures(each, weights, logits, targets))
        if rank == 0 and step % 20 == 0:
            means = " ".join(f"{name} {np.nanmean([f[name] for f in shown]):.3f}" for name in shown[0])
            print(f"step {step} progress {progress:.3f} length {tokens} {means} tokens {seen} per_s {seen / spent:.0f}", flush=True)
            shown = []
        if rank == 0 and (time.time() - saved_at > 90 or progress >= 1.0):
            saved_at = time.time()
            torch.save({"model": model.state_dict()} | optimizer.state(), a.checkpoint)
    if rank == 0:
        print(f"done: {step} steps, {seen} tokens, {(time.time() - begin) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
