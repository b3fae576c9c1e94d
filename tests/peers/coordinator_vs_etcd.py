#!/usr/bin/env python3
"""Durable writes a second: three coordinators against Debian's etcd 3.4, three processes each, fsync on, one entry of about
200 bytes a call, the same gRPC client, measured in turn. Prints the ratio of every round.

Usage: coordinator_vs_etcd.py TARGET_DIR [--clients 1000] [--connections 8] [--seconds 5] [--rounds 5]
TARGET_DIR holds `baton` and `examples/put_speed` (cargo build --release && cargo build --release -p baton-tests --example
put_speed). Installs the package etcd-server if there is no etcd.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

TARGET = 4.0


def ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    found = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return found


def etcd_binary():
    found = shutil.which("etcd")
    if not found:
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", "etcd-server"], check=True,
                       stdout=subprocess.DEVNULL)
        found = shutil.which("etcd")
    return found


def start_etcd(folder):
    clients, peers = ports(3), ports(3)
    members = ",".join(f"n{i}=http://127.0.0.1:{peers[i]}" for i in range(3))
    processes = []
    for i in range(3):
        processes.append(subprocess.Popen(
            [etcd_binary(), "--name", f"n{i}", "--data-dir", os.path.join(folder, f"etcd-{i}"),
             "--listen-client-urls", f"http://127.0.0.1:{clients[i]}",
             "--advertise-client-urls", f"http://127.0.0.1:{clients[i]}",
             "--listen-peer-urls", f"http://127.0.0.1:{peers[i]}",
             "--initial-advertise-peer-urls", f"http://127.0.0.1:{peers[i]}",
             "--initial-cluster", members, "--initial-cluster-state", "new"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return processes, [f"127.0.0.1:{port}" for port in clients]


def start_baton(baton, folder):
    chosen = ports(3)
    peers = [flag for i in range(3) for flag in ("--peer", f"{i + 1}=127.0.0.1:{chosen[i]}")]
    processes = []
    for i in range(3):
        processes.append(subprocess.Popen(
            [baton, "coordinator", "--log", "warn", "--node", str(i + 1), "--listen", f"127.0.0.1:{chosen[i]}",
             "--data", os.path.join(folder, f"baton-{i + 1}"), *peers],
            stdout=subprocess.DEVNULL))
    return processes, [f"127.0.0.1:{port}" for port in chosen]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    put_speed = os.path.join(options.target, "examples", "put_speed")

    def measure(peer, addresses, seconds):
        load = [str(options.clients), str(options.connections), str(seconds)]
        done = subprocess.run([put_speed, peer, *load, *addresses], check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            started, etcd = start_etcd(folder)
            processes += started
            started, coordinators = start_baton(os.path.join(options.target, "baton"), folder)
            processes += started
            time.sleep(3)
            ratios = []
            for turn in range(options.rounds):
                ours = measure("baton", coordinators, options.seconds)
                theirs = measure("etcd", etcd, options.seconds)
                ratios.append(ours["writes_per_s"] / theirs["writes_per_s"])
                print(f"round {turn + 1}: baton {ours['writes_per_s']:.0f}/s (p50 {ours['p50_ms']:.1f} ms, "
                      f"p99 {ours['p99_ms']:.1f}), etcd {theirs['writes_per_s']:.0f}/s (p50 {theirs['p50_ms']:.1f} ms, "
                      f"p99 {theirs['p99_ms']:.1f}), ratio {ratios[-1]:.2f}", flush=True)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    middle = statistics.median(ratios)
    print(f"median ratio {middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f}), target {TARGET}")
    return 0 if middle >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
