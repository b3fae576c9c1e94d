#!/usr/bin/env python3
"""Baton's links against NIXL (UCX between two processes) and Mooncake's transfer engine (tcp), block by block.

    python3 -m venv target/peers-venv && target/peers-venv/bin/pip install numpy torch nixl mooncake-transfer-engine-non-cuda
    target/peers-venv/bin/python tests/peers/transfer_vs_peers.py target/release/baton [--rounds 5] [--json]

Every round writes the same 256 MiB in blocks of one size, from one process into another, with NIXL, one call for all blocks,
and with Mooncake, which takes some hundreds a call, and runs `baton bench transfer` for that size; then prints the median and
the spread of the rounds' ratios. Baton's figures are those of blocks sent for the first time, checked, granted and committed;
the peers check nothing.
"""

import argparse
import json
import multiprocessing
import os
import signal
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


def nixl_source(pipe):
    agent, memory, local = nixl_agent("source")
    metadata, remote = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    peer = peer.decode() if isinstance(peer, bytes) else peer
    handles = {}

    def write(size):
        if size not in handles:
            blocks = lambda base: agent.get_xfer_descs([(base + at, size, 0) for at in range(0, BYTES, size)], "DRAM")
            handles[size] = agent.initialize_xfer("WRITE", blocks(local), blocks(remote), peer)
        state = agent.transfer(handles[size])
        while state != "DONE":
            assert state != "ERR", "NIXL failed"
            state = agent.check_xfer_state(handles[size])

    answer(pipe, write)
    del memory


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


def mooncake_source(pipe):
    engine, memory, ours = mooncake_engine()
    port, theirs = pipe.recv()

    def write(size):
        for first in range(0, BYTES, MOONCAKE_BLOCKS * size):
            offsets = range(first, min(first + MOONCAKE_BLOCKS * size, BYTES), size)
            local, remote = [ours + at for at in offsets], [theirs + at for at in offsets]
            failed = engine.batch_transfer_sync_write(f"127.0.0.1:{port}", local, remote, [size] * len(local))
            assert failed == 0, f"Mooncake failed: {failed}"

    answer(pipe, write)
    del memory


def answer(pipe, write):
    """Writes blocks of the sizes asked for and says how long each pass took; the first of a size connects and warms up."""
    seen = set()
    while (size := pipe.recv()) is not None:
        if size not in seen:
            seen.add(size)
            write(size)
        began = time.perf_counter()
        write(size)
        pipe.send(time.perf_counter() - began)


class Peer:
    """Two processes, stopped while something else is measured: both peers spin."""

    def __init__(self, name, target, source):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for function in (target, source):
            ours, theirs = context.Pipe()
            process = context.Process(target=function, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.pipes[1].send(self.pipes[0].recv())
        self.speed(64 << 10)

    def speed(self, size):
        """GB/s of one pass."""
        self.signal(signal.SIGCONT)
        self.pipes[1].send(size)
        seconds = self.pipes[1].recv()
        self.signal(signal.SIGSTOP)
        return BYTES / 1e9 / seconds

    def signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


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
    peers = [
        (Peer("nixl", nixl_target, nixl_source), "shm"),
        (Peer("mooncake", mooncake_target, mooncake_source), "tcp"),
    ]
    for kib in (16, 64, 256, 1024):
        rounds = []
        for _ in range(arguments.rounds):
            ours = baton(arguments.baton, kib)
            rounds.append([(ours[link], peer.speed(kib << 10)) for peer, link in peers])
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
        peer.close()


if __name__ == "__main__":
    main()
