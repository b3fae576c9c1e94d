#!/usr/bin/env bash
# Compiles every CUDA kernel for each architecture without a GPU and checks what came of it: that it compiles (by nvcc and, as
# workers do it, by NVRTC), registers, spills, shared memory, and tensor-core instructions in the matrix kernels. Downloads
# about 520 MB of CUDA's compilers from PyPI the first time, so it is no part of tests/run.sh. --json prints an object a line;
# the last line is `N passed, M failed`.
set -uo pipefail
cd "$(dirname "$0")/../.."

target="${CARGO_TARGET_DIR:-target}"
venv="$target/cuda-venv"
if ! ls "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/cuobjdump >/dev/null 2>&1; then
    python3 -m venv "$venv" && "$venv/bin/pip" install -q -r tests/gpu/requirements.txt || exit 1
fi
cuda=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)
out="$target/cuda-kernels"
rm -rf "$out" && mkdir -p "$out"

# NVRTC is compiled against by nothing and found at run time.
LD_LIBRARY_PATH="$(cd "$cuda/lib" && pwd)" \
    cargo run --release --locked -q -p baton-kernels --features cuda --example cubins -- "$out/cubins" sm_80 sm_90a sm_100a sm_120a \
    || echo "NVRTC does not compile the kernels"
exec python3 tests/gpu/compile.py "$cuda" kernels/src/cuda/src/kernels.cu "$out" "$@"
