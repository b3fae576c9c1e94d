#!/usr/bin/env bash
# Checks and measures everything on a machine with an NVIDIA GPU, in one call of under 10 minutes; builds nothing there:
#
#     tests/gpu/run.sh BATON ENGINE_TESTS OUT
#
# BATON is a release build with --features cuda, ENGINE_TESTS the engine's test binary of the same features. JSON lines go to
# OUT/figures.json, the rest to OUT/log; the last line is `N passed, M failed`. Needs the driver, NVRTC (or compiled kernels in
# $BATON_CUBINS), python3 with PyTorch and transformers for the ceilings and the peer, compute-sanitizer for the memory checks;
# what is missing is named and left out.
set -uo pipefail
cd "$(dirname "$0")/../.."
baton="$1" engine="$2" out="$3"
mkdir -p "$out"
figures="$out/figures.json" log="$out/log"
: >"$figures"
: >"$log"
export BATON_CUBINS="${BATON_CUBINS:-$out/cubins}" BATON_TEST_GPU="${BATON_CUBINS:-$out/cubins}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

# step NAME SECONDS COMMAND...: its JSON lines are figures, everything else is log.
step() {
    local name="$1" most="$2" start=$SECONDS
    shift 2
    echo "== $name" >>"$log"
    timeout -k 5 "$most" "$@" >"$work/out" 2>>"$log"
    local rc=$?
    grep '^{' "$work/out" >>"$figures"
    grep -v '^{' "$work/out" >>"$log"
    if [ $rc -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    echo "$name: exit code $rc after $((SECONDS - start)) s"
}
value() { sed -n "s/.*\"name\": *\"$1\", *\"value\": *\([0-9.]*\).*/\1/p" "$figures" | head -1; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$log"
if python3 -c 'import torch, transformers' 2>/dev/null; then
    step "ceilings, model and peer" 150 python3 tests/gpu/peer.py "$work/model"
else
    echo "no PyTorch here: no ceilings, no peer, no large model"
fi
ceilings=()
[ -z "$(value copy)" ] || ceilings+=(--copy-gbps "$(value copy)")
[ -z "$(value matmul)" ] || ceilings+=(--matmul-tflops "$(value matmul)")

step "kernels against the reference" 120 "$baton" doctor --gpu --json
step "kernels measured" 120 "$baton" doctor --gpu --small --measure --json "${ceilings[@]}"
step "same bytes" 120 "$engine" gpu --test-threads 4
[ ! -e "$work/model/config.json" ] ||
    step "engine" 120 "$baton" bench engine --device cuda --model "$work/model" --rounds 2 --json "${ceilings[@]}"
step "handoff from GPU to GPU" 60 "$baton" bench transfer --device cuda --rounds 15 --json
[ ! -e "$work/model/config.json" ] || {
    # The random model has no tokenizer of its own; prompts are given as tokens.
    cp models/baton-3m/tokenizer*.json "$work/model/"
    step "handoff" 100 python3 tests/gpu/handoff.py "$baton" "$work/model" "$work/data-large"
}
step "cluster with killed workers" 100 python3 tests/gpu/cluster.py "$baton" "$work/data"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 100 compute-sanitizer --tool "$tool" --error-exitcode 9 "$baton" doctor --gpu --small
    done
fi

echo
python3 - "$figures" <<'PY'
import json, sys
# What bits that are independent of the batch cost: a layer's matmuls against cuBLAS, whose bits are not, at the same rows.
found = {f["name"]: f["value"] for f in map(json.loads, open(sys.argv[1]))}
with open(sys.argv[1], "a") as figures:
    for rows in (1, 8, 64):
        name = f"layer_matmuls_{rows}_rows"
        if name in found and f"cublas {name}" in found:
            cost = 100 * (found[name] / found[f"cublas {name}"] - 1)
            cost = {"name": f"invariance_cost_{rows}_rows", "value": cost, "unit": "%", "target": 10, "ok": cost <= 10}
            figures.write(json.dumps(cost) + "\n")
    # Weights of 8 bits are half of what a decode step reads.
    of_bf16, of_f8 = found.get("layer_matmuls_1_rows"), found.get("layer_matmuls_f8_1_rows")
    if of_bf16 and of_f8:
        gain = {"name": "f8_gain_1_rows", "value": of_bf16 / of_f8, "unit": "times", "target": 1.6, "ok": of_bf16 / of_f8 >= 1.6}
        figures.write(json.dumps(gain) + "\n")
for line in open(sys.argv[1]):
    f = json.loads(line)
    if f["unit"] == "relative error" and f["ok"]:
        continue
    target = "" if f["target"] is None else f"target {f['target']:g}"
    print(f"{f['name'][:64]:64} {f['value']:14.3f} {f['unit']:10} {target:14} {'' if f['ok'] else 'MISSED'}")
PY
wrong=$(grep -c '"unit": *"relative error".*"ok": *false' "$figures")
checked=$(grep -c '"unit": *"relative error"' "$figures")
echo "$checked kernel checks, $wrong wrong"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
