#!/usr/bin/env bash
# The headline on a GPU: cifar10_resnet18_50ep, three seeds, each run kept as one JSON file, and the curves.
# Usage: bash results/gpu.sh DATA_DIR [SET] [more fields]; SET is cifar10 (prepared) unless given.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 set=${2:-cifar10}
shift $(($# < 2 ? $# : 2))
kept=results/${set}_resnet18_50ep
mkdir -p "$kept"
for seed in 0 1 2; do
  run=runs/${set}_resnet18_50ep-seed$seed
  python -m train cifar10_resnet18_50ep --data.name "$set" --data.dir "$data" --seed "$seed" --out "$run" "$@"
  python -m train.report "$run" --json "$kept/seed$seed.json"
done
python -m train.report "$kept"/seed?.json --picture "$kept/curve.png"
