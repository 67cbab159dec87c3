#!/usr/bin/env bash
# The package without any extra, in an environment of its own (.venv-bare): every command's help, a small run, and what
# needs an extra names it in one line. Usage: bash scripts/bare.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv-bare} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
bash scripts/setup.sh
icons=$PWD/$VENV/bin/icons data=$PWD/tests/data/original_llava out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$out"
for name in $("$icons" --help | awk '/^  [a-z]/ {print $1}'); do "$icons" "$name" --help >/dev/null; done
given=(--data "$data/data.json" --images "$data" --quiet --trainer.accelerator cpu)
"$icons" warmup --model "$data/vicuna-tiny" --vision-tower "$data/clip" --mm-projector "$data/mm_projector.bin" \
  "${given[@]}" --lora-rank 2 --held-out 0 --out start
"$icons" gradients --checkpoint start "${given[@]}" --dim 32 --out train.zarr
"$icons" influence --train train.zarr --task a=train.zarr --preconditioned-tasks --accelerator cpu --quiet --out scores.zarr
"$icons" select --scores scores.zarr --data "$data/data.json" --fraction 0.4 --quiet --out selected.json
said=$("$icons" report --scores scores.zarr --selection selected.json --data "$data/data.json" 2>&1) && exit 1
[ "$said" = "icons report: error: needs matplotlib, which is not installed: pip install 'icons-lightning[report]'" ]
echo "bare: every command answers, and a run ends in $(wc -c <selected.json) bytes"
