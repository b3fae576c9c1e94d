#!/usr/bin/env python3
"""Baton's engine and llama.cpp on the same weights, interleaved: a bf16 model directory and its GGUF, or, with --quantize,
one GGUF file that llama.cpp quantizes from it and both read.

usage: engine_vs_llama.py BATON MODEL_DIR GGUF [--quantize q8_0|q4_0] [--threads 2] [--rounds 5] [--json]
Each engine runs in a process of its own, one at a time. Prints one line a figure and round, then the medians.
"""
import argparse
import json
import os
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


def quantized(gguf, kind):
    """A quantized copy beside the file, made by llama.cpp unless it is there."""
    import llama_cpp

    path = f"{gguf.removesuffix('.gguf')}-{kind}.gguf"
    if not os.path.exists(path):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
        if llama_cpp.llama_model_quantize(gguf.encode(), path.encode(), params) != 0:
            raise SystemExit(f"llama.cpp cannot quantize {gguf} to {kind}")
    return path


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
    parser.add_argument("--quantize", choices=["q8_0", "q4_0"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return llama(args.gguf, args.threads)

    if args.quantize:
        args.model = args.gguf = quantized(args.gguf, args.quantize)
    kind = f"_{args.quantize}" if args.quantize else ""
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
            print(json.dumps({"name": f"{name}{kind}_vs_llama_cpp", "value": median, "unit": "ratio", "target": 1.0, "ok": median >= 1.0}))
        else:
            print(f"{name}: median ratio {median:.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
