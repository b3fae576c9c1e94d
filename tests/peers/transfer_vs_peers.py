#!/usr/bin/env python3
"""Baton's links against NIXL (UCX between two processes) and Mooncake's transfer engine (tcp), block by block.

    python3 -m venv target/peers-venv && target/peers-venv/bin/pip install numpy torch nixl mooncake-transfer-engine-non-cuda
    target/peers-venv/bin/python tests/peers/transfer_vs_peers.py target/release/baton [--rounds 5] [--json]

Every round writes the same 256 MiB in blocks of one size, from one process into another, with NIXL, one call for all
blocks, and with Mooncake, which takes some hundreds a call, and runs `baton bench transfer` for that size; then prints each round's ratio's median and spread. Baton's
figures are those of blocks sent for the first time, checked, granted and committed; the peers check nothing.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import time

import numpy

BYTES = 256 << 20
# More in one call are refused: its queue is full.
MOONCAKE_BLOCKS = 512
# Of kvtransfer's targets: times as fast, by size in KiB.
TARGETS = {"nixl": {16: 8, 64: 5}, "mooncake": {16: 4, 64: 2, 256: 1.3}}


def filled():
    """Memory that is in use, 4 KiB aligned."""
    memory = numpy.zeros(BYTES + 4096, dtype=numpy.uint8)
    memory[:] = 7
    return memory, (memory.ctypes.data + 4095) // 4096 * 4096


def nixl_agent(name):
    from nixl._api import nixl_agent as Agent
    from nixl._api import nixl_agent_config as Config

    memory, base = filled()
    agent = Agent(name, Config(backends=["UCX"]))
    agent.register_memory([(base, BYTES, 0, "")], "DRAM")
    return agent, memory, base


def nixl_target(pipe):
    agent, memory, base = nixl_agent("target")
    pipe.send((agent.get_agent_metadata(), base))
    pipe.recv()
    del memory


class Nixl:
    name = "nixl"

    def __init__(self):
        self.pipe, self.child = child(nixl_target)
        metadata, self.remote = self.pipe.recv()
        self.agent, self.memory, self.local = nixl_agent("source")
        self.peer = self.agent.add_remote_agent(metadata)
        self.peer = self.peer.decode() if isinstance(self.peer, bytes) else self.peer
        self.handles = {}

    def write(self, size):
        if size not in self.handles:
            blocks = lambda base: self.agent.get_xfer_descs([(base + at, size, 0) for at in range(0, BYTES, size)], "DRAM")
            self.handles[size] = self.agent.initialize_xfer("WRITE", blocks(self.local), blocks(self.remote), self.peer)
        state = self.agent.transfer(self.handles[size])
        while state != "DONE":
            assert state != "ERR", "NIXL failed"
            state = self.agent.check_xfer_state(self.handles[size])


def mooncake_engine():
    from mooncake.engine import TransferEngine

    memory, base = filled()
    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0, "Mooncake does not start"
    assert engine.register_memory(base, BYTES) == 0, "Mooncake does not take the memory"
    return engine, memory, base


def mooncake_target(pipe):
    engine, memory, base = mooncake_engine()
    pipe.send((engine.get_rpc_port(), base))
    pipe.recv()
    del memory


class Mooncake:
    name = "mooncake"

    def __init__(self):
        self.pipe, self.child = child(mooncake_target)
        port, self.remote = self.pipe.recv()
        self.peer = f"127.0.0.1:{port}"
        self.engine, self.memory, self.local = mooncake_engine()

    def write(self, size):
        for first in range(0, BYTES, MOONCAKE_BLOCKS * size):
            offsets = range(first, min(first + MOONCAKE_BLOCKS * size, BYTES), size)
            local, remote = [self.local + at for at in offsets], [self.remote + at for at in offsets]
            failed = self.engine.batch_transfer_sync_write(self.peer, local, remote, [size] * len(local))
            assert failed == 0, f"Mooncake failed: {failed}"


def child(target):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,), daemon=True)
    process.start()
    return ours, process


def speed(write, size):
    began = time.perf_counter()
    write(size)
    return BYTES / 1e9 / (time.perf_counter() - began)


def baton(binary, kib):
    command = [binary, "bench", "transfer", "--size", str(kib), "--rounds", "1", "--json"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    figures = {figure["name"]: figure["value"] for figure in map(json.loads, lines)}
    return {link: figures.get(f"{kib}KiB/streaming/{link}") for link in ("shm", "tcp")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baton")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    peers = [(Nixl(), "shm"), (Mooncake(), "tcp")]
    for kib in (16, 64, 256, 1024):
        for peer, _ in peers:
            peer.write(kib << 10)  # Connects, and touches every page.
        rounds = []
        for _ in range(arguments.rounds):
            ours = baton(arguments.baton, kib)
            rounds.append([(ours[link], speed(peer.write, kib << 10)) for peer, link in peers])
        for (peer, link), pairs in zip(peers, zip(*rounds)):
            if any(own is None for own, _ in pairs):
                print(f"{kib} KiB: Baton has no {link} here")
                continue
            ratios = [own / theirs for own, theirs in pairs]
            ratio, target = statistics.median(ratios), TARGETS[peer.name].get(kib)
            name = f"{kib}KiB/{link}/{peer.name}"
            if arguments.json:
                ok = None if target is None else ratio >= target
                print(json.dumps({"name": name, "value": ratio, "unit": "ratio", "target": target, "ok": ok}), flush=True)
                continue
            own, theirs = (statistics.median(side) for side in zip(*pairs))
            wanted = "" if target is None else f", target {target}"
            print(
                f"{name}: {ratio:.2f} x ({min(ratios):.2f}-{max(ratios):.2f}{wanted}); {own:.2f} and {theirs:.2f} GB/s",
                flush=True,
            )
    for peer, _ in peers:
        peer.pipe.send("end")
        peer.child.join(10)


if __name__ == "__main__":
    main()
