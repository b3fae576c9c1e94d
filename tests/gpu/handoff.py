"""The handoff between two processes on one GPU, with a large model: `handoff.py BATON MODEL DATA`. Time to the first token of prompts
of 4096 tokens that nobody has seen, with a prefill and a decode worker and with a decode worker alone, and which links the handoffs
took. Prints a JSON object a line; exit code 1 when they did not go from GPU to GPU. Called by run.sh."""

import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

baton, model, data = sys.argv[1:4]
PORT, PROMPT, ROUNDS = 8132, 4096, 6
draw = random.Random(7)


def say(name, value, unit, target=None, ok=True):
    print(json.dumps({"name": name, "value": value, "unit": unit, "target": target, "ok": bool(ok)}), flush=True)


def get(path):
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=5) as answer:
        return answer.read()


def first_token(name):
    body = {"model": name, "prompt": [draw.randrange(1000) for _ in range(PROMPT)], "max_tokens": 4, "temperature": 0,
            "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    start = time.monotonic()
    with urllib.request.urlopen(request, timeout=60) as answer:
        took = None
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                took = took or time.monotonic() - start
    return took


def links():
    """Handoffs by link, and why links are not the best, as the prefill worker counts them."""
    shown = subprocess.run([baton, "status", "--data", data, "--json"], capture_output=True, text=True, timeout=10).stdout
    process = next(p for p in json.loads(shown)["processes"] if p["role"] == "prefill" and p["metrics"])
    with urllib.request.urlopen(f"http://{process['metrics']}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    counted = re.findall(r'baton_worker_link_(?:transfers|fallbacks)_total\{(?:link|reason)="(\w+)"\} (\d+)', text)
    return {name: int(count) for name, count in counted}


def measure(prefill):
    up = subprocess.Popen([baton, "up", "--device", "cuda", "--prefill", str(prefill), "--decode", "1", "--port", str(PORT),
                           "--batch-tokens", str(PROMPT), "--kv-blocks", "2048", "--model", model, "--data", data],
                          stdout=sys.stderr, stderr=sys.stderr)
    try:
        start = time.monotonic()
        while True:
            try:
                if json.loads(get("/v1/models"))["data"] and get("/health") is not None:
                    break
            except Exception:
                pass
            if up.poll() is not None or time.monotonic() - start > 60:
                raise RuntimeError("the cluster does not come up")
            time.sleep(0.05)
        name = json.loads(get("/v1/models"))["data"][0]["id"]
        took = [first_token(name) for _ in range(ROUNDS)]
        return statistics.median(took[1:]), took[0], links() if prefill else {}
    finally:
        up.send_signal(signal.SIGTERM)
        try:
            up.wait(20)
        except subprocess.TimeoutExpired:
            up.kill()


alone, _, _ = measure(0)
say(f"time to first token, {PROMPT} tokens, decode worker alone", alone * 1e3, "ms")
pair, first, taken = measure(1)
say(f"time to first token, {PROMPT} tokens, handed over", pair * 1e3, "ms")
say("time to first token, the first handoff", first * 1e3, "ms")
say("handoff, exposed share of the prefill", 100 * (pair - alone) / alone, "%", 10, pair - alone <= 0.1 * alone)
others = {name: count for name, count in taken.items() if name != "gpu" and count}
say("handoffs from GPU to GPU", taken.get("gpu", 0), "handoffs", ROUNDS, taken.get("gpu", 0) >= ROUNDS)
print("other links and fallbacks:", others or "none")
sys.exit(taken.get("gpu", 0) < ROUNDS)
