#!/usr/bin/env python3
"""The official openai client against `baton up`: chat and completion, streamed and whole, errors as typed exceptions.

usage: openai_client.py PATH_TO_BATON
"""
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import openai


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_healthy(url, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "baton up ended early"
        try:
            if urllib.request.urlopen(f"{url}/health", timeout=1).status == 200:
                return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("not healthy within 60 s")


def check(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    ask = [{"role": "user", "content": "In the beginning"}]

    whole = client.chat.completions.create(model=model, messages=ask, temperature=0, max_tokens=24, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content), whole

    stream = client.chat.completions.create(
        model=model, messages=ask, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    pieces, usage, finish = [], None, None
    for chunk in stream:
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == text, (pieces, text)
    assert usage == whole.usage or usage.completion_tokens == whole.usage.completion_tokens
    assert finish == whole.choices[0].finish_reason
    assert len(pieces) > 3, "it did not stream"

    completion = client.completions.create(model=model, prompt="And God said", max_tokens=8, temperature=0, n=2)
    assert len(completion.choices) == 2 and completion.choices[0].text == completion.choices[1].text

    for error, call in [
        (openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-9", messages=ask)),
        (openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=ask, temperature=-1)),
        (openai.BadRequestError, lambda: client.completions.create(model=model, prompt="word " * 100_000)),
    ]:
        try:
            call()
        except error as e:
            assert e.body["message"], e
        else:
            raise AssertionError(f"{error.__name__} expected")
    print(json.dumps({"model": model, "text": text, "chunks": len(pieces)}))


def main():
    url = f"http://127.0.0.1:{(port := free_port())}"
    with tempfile.TemporaryDirectory() as data:
        up = subprocess.Popen([sys.argv[1], "up", "--port", str(port), "--data", data], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        try:
            wait_until_healthy(url, up)
            check(url)
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(timeout=30)
    print("openai client: passed")


if __name__ == "__main__":
    main()
