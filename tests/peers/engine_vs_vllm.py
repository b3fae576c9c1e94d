#!/usr/bin/env python3
"""Baton's engine and vLLM's CPU backend on the same bf16 weights, interleaved: prefill of 512 tokens, decode of 1, 8 and 32
sequences behind 64 tokens.

usage: engine_vs_vllm.py BATON MODEL_DIR [--threads 2] [--rounds 5] [--eager] [--json]
vLLM stays loaded in a process of its own and waits while Baton measures. Prints one line a figure and round, then the medians.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

PREFILL, CONTEXT, STEPS = 512, 64, 32
BATCHES = (1, 8, 32)
# What Baton is to reach, as a multiple of vLLM.
TARGETS = {"prefill_512": 1.15, "decode_batch_8": 1.6, "decode_batch_32": 1.5}


def peer(model, threads, eager):
    """A round for each line of input, as a line of JSON; runs in a child process of this script."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What vLLM prints is no answer.
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
    )
    import vllm

    started = time.perf_counter()
    llm = vllm.LLM(
        model=model, dtype="bfloat16", max_model_len=2048, max_num_seqs=max(BATCHES), max_num_batched_tokens=2048,
        enable_prefix_caching=False, enforce_eager=eager, seed=1,
    )

    def seconds(count, length, tokens):
        ids = [[(i * 7919 + n * 104729) % 1900 + 10 for i in range(length)] for n in range(count)]
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
        return time.perf_counter() - start

    seconds(1, PREFILL, 2)  # Warm-up.
    print(json.dumps({"load": time.perf_counter() - started, "version": vllm.__version__}), file=answers, flush=True)
    for _ in sys.stdin:
        found = {"prefill_512": PREFILL / min(seconds(1, PREFILL, 1) for _ in range(3))}
        for batch in BATCHES:
            # The steps alone: what the prompts and the first tokens take is taken off.
            rest = min(seconds(batch, CONTEXT, STEPS + 1) for _ in range(2)) - min(seconds(batch, CONTEXT, 1) for _ in range(2))
            found[f"decode_batch_{batch}"] = batch * STEPS / rest
        print(json.dumps(found), file=answers, flush=True)


def baton(binary, model, threads):
    command = [binary, "bench", "engine", "--model", model, "--threads", str(threads), "--context", str(CONTEXT), "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {row["name"]: row["value"] for row in map(json.loads, output.splitlines())}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baton")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.model, args.threads, args.eager)

    command = [sys.executable, __file__, args.baton, args.model, "--threads", str(args.threads), "--peer"]
    child = subprocess.Popen(command + ["--eager"] * args.eager, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer():
        line = child.stdout.readline()
        if not line:
            raise SystemExit("vLLM ended; see above")
        return json.loads(line)

    about = answer()
    if not args.json:
        print(f"vLLM {about['version']}: ready and warm after {about['load']:.1f} s", flush=True)
    ratios = {}
    for number in range(args.rounds):
        print(file=child.stdin, flush=True)
        theirs = answer()
        ours = baton(args.baton, args.model, args.threads)
        for name, value in theirs.items():
            ratios.setdefault(name, []).append(ours[name] / value)
            if not args.json:
                print(f"round {number} {name}: baton {ours[name]:.1f}, vLLM {value:.1f} tokens/s, ratio {ratios[name][-1]:.2f}", flush=True)
    child.stdin.close()
    child.wait()
    for name, values in ratios.items():
        median = statistics.median(values)
        if args.json:
            target = TARGETS.get(name, 1.0)
            print(json.dumps({"name": f"{name}_vs_vllm", "value": median, "unit": "ratio", "target": target, "ok": median >= target}))
        else:
            print(f"{name}: median ratio {median:.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
