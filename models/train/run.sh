#!/bin/sh
# Makes models/baton-3m anew: installs what it needs on Debian, trains, exports, measures and checks.
# Usage: models/train/run.sh [OUT]   (default: models/baton-3m; environment: WORK, TOKENS)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../baton-3m}
work=${WORK:-/tmp/baton-train}
tokens=${TOKENS:-4e6}
mkdir -p "$out" "$work"
out=$(cd "$out" && pwd)

# The texts: public domain, needed only while training.
apt-get update
apt-get install -y --no-install-recommends python3-venv bible-kjv bible-kjv-text dict-devil

python3 -m venv "$work/venv"
. "$work/venv/bin/activate"
pip install torch==2.9.1 numpy tokenizers==0.23.3 safetensors==0.8.0 transformers==5.23.0 jinja2

cd "$here"
python tokenizer.py "$out"
torchrun --standalone --nproc-per-node 2 train.py "$work/checkpoint.pt" --tokenizer "$out/tokenizer.json" --tokens "$tokens"
python export.py "$work/checkpoint.pt" "$out"
python evaluate.py "$out"
python check.py "$out"
(cd "$out" && sha256sum ./*)
