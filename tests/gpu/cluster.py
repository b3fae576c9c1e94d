"""A cluster of one prefill and one decode worker on one GPU: `cluster.py BATON DATA`. Streams are compared with undisturbed ones
while workers are killed. Prints a JSON object a line; exit code 1 when a stream differs or fails. Called by run.sh."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

baton, data = sys.argv[1:3]
PORT, STREAMS, TOKENS = 8131, 12, 160
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def say(name, value, unit, target, ok):
    print(json.dumps({"name": name, "value": value, "unit": unit, "target": target, "ok": bool(ok)}), flush=True)


def prompt(i):
    return " ".join(LETTERS[(i * 7 + j * (i + 3)) % 26] * (1 + j % 3) for j in range(60 + 20 * i))


def stream(i, texts, arrived, firsts):
    body = {"model": model, "prompt": prompt(i), "max_tokens": TOKENS, "temperature": 0.8 if i % 2 else 0.0, "seed": i,
            "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    text, start = "", time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        texts[i] = f"error: {event['error']}"
                        return
                    if event.get("choices"):
                        text += event["choices"][0]["text"]
                        firsts.setdefault(i, time.monotonic() - start)
                        arrived.set()
        texts[i] = text
    except Exception as error:
        texts[i] = f"error: {error!r}"


def all_streams(kill=None):
    texts, arrived, firsts = {}, threading.Event(), {}
    threads = [threading.Thread(target=stream, args=(i, texts, arrived, firsts)) for i in range(STREAMS)]
    start = time.monotonic()
    [thread.start() for thread in threads]
    if kill:
        arrived.wait(60)
        os.kill(process(kill), signal.SIGKILL)
    [thread.join() for thread in threads]
    return texts, time.monotonic() - start, sorted(firsts.values())


def processes():
    shown = subprocess.run([baton, "status", "--data", data, "--json"], capture_output=True, text=True).stdout
    return [json.loads(line) for line in shown.splitlines() if line.startswith("{")]


def process(role):
    found = [p for p in flat(processes()) if p.get("role") == role and p.get("pid")]
    return found[0]["pid"]


def flat(value):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from flat(one)


def ready():
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1) as answer:
            return answer.status == 200
    except Exception:
        return False


up = subprocess.Popen([baton, "up", "--device", "cuda", "--prefill", "1", "--decode", "1", "--port", str(PORT), "--data", data],
                      stdout=sys.stderr, stderr=sys.stderr)
start = time.monotonic()
while not ready():
    if up.poll() is not None or time.monotonic() - start > 60:
        say("up", time.monotonic() - start, "s", 60, False)
        sys.exit(1)
    time.sleep(0.05)
say("up to ready", time.monotonic() - start, "s", 60, True)
failed = 0
with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models") as answer:
    model = json.load(answer)["data"][0]["id"]
try:
    expected, took, firsts = all_streams()
    say("undisturbed streams", took, "s", None, True)
    say("first token, median", firsts[len(firsts) // 2] if firsts else -1, "s", None, bool(firsts))
    bad = sum(text.startswith("error") or not text for text in expected.values())
    say("streams that failed", bad, "streams", 0, bad == 0)
    failed += bad
    if bad:
        print(expected, file=sys.stderr)
    for role in ("decode", "prefill", "decode"):
        found, took, _ = all_streams(role)
        wrong = sum(found[i] != expected[i] for i in range(STREAMS))
        say(f"streams that differ after kill -9 of the {role} worker", wrong, "streams", 0, wrong == 0)
        failed += wrong
        if wrong:
            print({i: (expected[i][-80:], found[i][-80:]) for i in expected if found[i] != expected[i]}, file=sys.stderr)
        again = time.monotonic()
        while not ready() and time.monotonic() - again < 30:
            time.sleep(0.05)
finally:
    up.send_signal(signal.SIGTERM)
    try:
        up.wait(20)
    except subprocess.TimeoutExpired:
        up.kill()
sys.exit(failed > 0)
