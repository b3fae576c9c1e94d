#!/usr/bin/env bash
# Installs what the tests need and runs them all. The last line is `N passed, M failed`.
set -uo pipefail
cd "$(dirname "$0")/.."

# Property tests draw the same cases every time, so that a failure here repeats there; another number explores others.
export PROPTEST_RNG_SEED="${PROPTEST_RNG_SEED:-20261121}"

step() { printf '\n== %s\n' "$*"; }
passed=0
failed=0

step "build"
cargo build --release --locked || exit 1

step "UCX, for the link over it (without it that link's tests go by tcp)"
ldconfig -p 2>/dev/null | grep -q libucp.so.0 || apt-get install -y -q libucx0 >/dev/null 2>&1 ||
    { apt-get update -q && apt-get install -y -q libucx0; } >/dev/null 2>&1 || echo "libucx0 could not be installed"

step "cargo test"
log=target/test.log
cargo test --release --locked --workspace --no-fail-fast 2>&1 | tee "$log"
[ "${PIPESTATUS[0]}" -eq 0 ] || failing=1
# The GPU's kernels and backend, on an emulation of a GPU that the system's C++ compiler builds. The binary's crate is named so that
# the packages below keep the features they were built with.
cargo test --release --locked -p baton-kernels -p baton-engine -p baton-cli --features baton-kernels/cuda,baton-engine/cuda \
    --no-fail-fast --lib --test emulated --test suite -- cuda gpu every_kernel 2>&1 | tee -a "$log"
[ "${PIPESTATUS[0]}" -eq 0 ] || failing=1
passed=$(awk '/^test result:/ {n += $4} END {print n + 0}' "$log")
failed=$(awk '/^test result:/ {n += $6} END {print n + 0}' "$log")
# A test binary that did not build or was killed prints no result line.
if [ "${failing:-0}" -eq 1 ] && [ "$failed" -eq 0 ]; then failed=1; fi

step "the official openai client"
venv=target/clients-venv
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv" 2>/dev/null || {
        # Debian ships venv apart from python3.
        apt-get install -y -q python3 python3-venv >/dev/null 2>&1 || { apt-get update -q && apt-get install -y -q python3 python3-venv; }
        python3 -m venv "$venv"
    } || true
fi
if "$venv/bin/python" -c 'import openai' 2>/dev/null || "$venv/bin/pip" install -q -r tests/clients/requirements.txt; then
    if "$venv/bin/python" tests/clients/openai_client.py target/release/baton; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
else
    echo "the openai client could not be installed"
    failed=$((failed + 1))
fi

echo
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
