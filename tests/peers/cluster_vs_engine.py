#!/usr/bin/env python3
"""A cluster's throughput with many streams beside what its engine does alone with the same work, in turn.

usage: cluster_vs_engine.py BATON MODEL [--streams 32] [--prompt 64] [--tokens 256] [--rounds 3] [--json] [-- flags of baton up]
Alone: `baton bench engine` on all cores; the same prompts prefilled and the same tokens decoded at a batch of 8 and 32, as long
as its rates say. Cluster: gateway, coordinator, prefill and decode worker, and the client, as processes on the same cores.
Prints the ratio of every round and the median (target 0.9).
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request


def lines(command):
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {row["name"]: row["value"] for row in map(json.loads, output.splitlines())}


def engine(args):
    threads = str(os.cpu_count())
    found = lines([args.baton, "bench", "engine", "--model", args.model, "--threads", threads, "--rounds", "1", "--json"])
    rate = found[f"decode_batch_{args.streams}"]
    seconds = args.streams * (args.prompt / found["prefill_512"] + args.tokens / rate)
    return args.streams * args.tokens / seconds, rate


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cluster(args, flags):
    with tempfile.TemporaryDirectory() as data:
        up = subprocess.Popen(
            [args.baton, "up", "--model", args.model, "--port", str(args.port), "--data", data, *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{args.port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(url + "/health").read()
                    break
                except OSError:
                    time.sleep(0.1)
            status = subprocess.run([args.baton, "status", "--json", "--data", data], check=True, capture_output=True, text=True).stdout
            processes = {process["id"]: process["pid"] for process in json.loads(status)["processes"]}
            before = {name: cpu_seconds(pid) for name, pid in processes.items()}
            began = time.monotonic()
            found = lines(
                [args.baton, "bench", "serve", "--url", url, "--requests", str(args.streams), "--concurrency", str(args.streams)]
                + ["--prompt-tokens", str(args.prompt), "--max-tokens", str(args.tokens), "--ignore-eos", "--json"]
            )
            took = time.monotonic() - began
            used = {name: (cpu_seconds(pid) - before[name]) / took for name, pid in processes.items()}
            return found, used
        finally:
            up.send_signal(signal.SIGINT)
            up.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baton")
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8791)
    parser.add_argument("--json", action="store_true")
    given = sys.argv[1:]
    flags = given[given.index("--") + 1 :] if "--" in given else []
    args = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    ratios = []
    for number in range(args.rounds):
        alone, decode = engine(args)
        found, used = cluster(args, flags)
        ratios.append(found["output_throughput"] / alone)
        if not args.json:
            shares = ", ".join(f"{name} {share:.2f}" for name, share in used.items())
            print(
                f"round {number}: engine {alone:.0f} tokens/s (decode {decode:.0f}), cluster {found['output_throughput']:.0f}, "
                f"ratio {ratios[-1]:.2f}; cores used: {shares}",
                flush=True,
            )
    median = statistics.median(ratios)
    if args.json:
        print(json.dumps({"name": "cluster_of_engine", "value": median, "unit": "x", "target": 0.9, "ok": median >= 0.9}))
    else:
        print(f"cluster / engine: median {median:.2f} ({min(ratios):.2f}-{max(ratios):.2f}), target 0.9")


if __name__ == "__main__":
    main()
