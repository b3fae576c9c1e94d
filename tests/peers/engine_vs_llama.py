#!/usr/bin/env python3
"""Baton's engine and llama.cpp on the same bf16 weights, interleaved.

usage: engine_vs_llama.py BATON MODEL_DIR GGUF [--threads 2] [--rounds 5] [--json]
Each engine runs in a process of its own, one at a time. Prints one line a figure and round, then the medians.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

PREFILL, DECODE = 512, 64


def llama(gguf, threads):
    """Prefill and decode tokens/s of llama.cpp; runs in a child process of this script."""
    import llama_cpp

    model = llama_cpp.Llama(gguf, n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    tokens = [(i * 7919) % 1900 + 10 for i in range(PREFILL)]
    model.eval(tokens[:64])  # Warm-up: pages, threads.
    prefill = []
    for _ in range(3):
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
        prefill.append(PREFILL / (time.perf_counter() - start))
    start = time.perf_counter()
    for i in range(DECODE):
        model.eval([tokens[i]])
    decode = DECODE / (time.perf_counter() - start)
    print(json.dumps({"prefill": max(prefill), "decode": decode}))


def baton(binary, model, threads):
    output = subprocess.run(
        [binary, "bench", "engine", "--model", model, "--threads", str(threads), "--json"], check=True, capture_output=True, text=True
    ).stdout
    return {row["name"]: row["value"] for row in map(json.loads, output.splitlines())}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baton")
    parser.add_argument("model")
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return llama(args.gguf, args.threads)

    names = {"prefill": "prefill_512", "decode": "decode_batch_1"}
    ratios = {name: [] for name in names}
    for round_number in range(args.rounds):
        command = [sys.executable, __file__, args.baton, args.model, args.gguf, "--threads", str(args.threads), "--peer"]
        peer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ours = baton(args.baton, args.model, args.threads)
        for name, key in names.items():
            ratios[name].append(ours[key] / peer[name])
            if not args.json:
                print(f"round {round_number} {name}: baton {ours[key]:.1f}, llama.cpp {peer[name]:.1f} tokens/s, ratio {ratios[name][-1]:.2f}")
    for name, values in ratios.items():
        median = statistics.median(values)
        if args.json:
            print(json.dumps({"name": f"{name}_vs_llama_cpp", "value": median, "unit": "ratio", "target": 1.0, "ok": median >= 1.0}))
        else:
            print(f"{name}: median ratio {median:.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
