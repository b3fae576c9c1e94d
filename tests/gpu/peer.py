"""What the GPU can do at most, and the same model in PyTorch: `peer.py FOLDER`. Writes a random model of Llama-3-8B's shape into
FOLDER (16 GB) and prints a JSON object a line. Needs PyTorch and transformers, on a machine with a GPU. Called by run.sh."""

import json
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache

PREFILL, CONTEXT, STEPS = 4096, 1024, 32


def say(name, value, unit):
    print(json.dumps({"name": name, "value": value, "unit": unit, "target": None, "ok": True}), flush=True)


def seconds(work, times=10):
    """Median over `times`, by events of the device."""
    for _ in range(3):
        work()
    found = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def ceilings():
    bytes_moved = 4 << 30
    source = torch.empty(bytes_moved // 4, dtype=torch.int32, device="cuda").random_()
    to = torch.empty_like(source)
    say("copy", 2 * bytes_moved / seconds(lambda: to.copy_(source)) / 1e9, "GB/s")
    del source, to
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    say("matmul", 2 * 8192**3 / seconds(lambda: a @ b) / 1e12, "TFLOP/s")


# Matmuls of a layer: (outputs, inputs).
LAYER = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def layer_matmuls(device="cuda", layers=3, turns=4):
    """A layer's matmuls by cuBLAS, at the rows of decode batches, as one captured graph over several layers' weights."""
    weights = [[torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5 for n, k in LAYER] for _ in range(layers)]
    for rows in (1, 8, 64):
        inputs = {k: torch.randn(rows, k, device=device, dtype=torch.bfloat16) for k in {k for _, k in LAYER}}
        outputs = {n: torch.empty(rows, n, device=device, dtype=torch.bfloat16) for n in {n for n, _ in LAYER}}

        def work():
            for layer in weights * turns:
                for w in layer:
                    torch.mm(inputs[w.shape[1]], w.t(), out=outputs[w.shape[0]])

        if device == "cpu":
            work()
            continue
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        say(f"cublas layer_matmuls_{rows}_rows", seconds(graph.replay) / (layers * turns) * 1e6, "us")


def shape(small=False):
    if small:
        return LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=False)
    return LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
                       rope_theta=500000.0, tie_word_embeddings=False)


def model(config, device):
    torch.manual_seed(1)
    with torch.device(device):
        made = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return made.eval()


@torch.inference_mode()
def prefill(made):
    ids = torch.randint(0, made.config.vocab_size, (1, PREFILL), device=made.device)
    took = seconds(lambda: made(ids, use_cache=True, logits_to_keep=1), 5)
    say("pytorch prefill_4096", PREFILL / took, "tokens/s")


@torch.inference_mode()
def decode(made, batch, graph=True):
    """One captured graph a step, so that launching costs nothing."""
    cache = StaticCache(config=made.config, max_cache_len=CONTEXT + 2 * STEPS)
    ids = torch.randint(0, made.config.vocab_size, (batch, CONTEXT), device=made.device)
    made(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, cache_position=torch.arange(CONTEXT, device=made.device))
    token, at = ids[:, :1].clone(), torch.tensor([CONTEXT], device=made.device)

    def step():
        logits = made(token, past_key_values=cache, use_cache=True, cache_position=at, position_ids=at[None]).logits
        token.copy_(logits[:, -1:].argmax(-1))

    if not graph:
        return step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    say(f"pytorch decode_batch_{batch}", batch / seconds(captured.replay, STEPS), "tokens/s")


def main():
    if sys.argv[1] == "--small":
        # The calls, on a CPU.
        decode(model(shape(small=True), "cpu"), 2, graph=False)
        layer_matmuls("cpu", layers=1, turns=1)
        return
    ceilings()
    layer_matmuls()
    made = model(shape(), "cuda")
    start = time.time()
    made.save_pretrained(sys.argv[1], max_shard_size="5GB")
    say("model written", time.time() - start, "s")
    for work in (lambda: prefill(made), lambda: decode(made, 1), lambda: decode(made, 64)):
        try:
            work()
        except Exception as error:  # the peer's failure is no failure of ours
            print(f"pytorch: {error}", file=sys.stderr, flush=True)


main()
