#!/usr/bin/env bash
# Pruning on a GPU: ResNet-20 to 50-95 % by all ways of results/prune.sh, ResNet-56 without 30 % of its
# channels, and the latency of a ResNet-18 with half of its channels.
# Usage: bash results/gpu_prune.sh DATA_DIR [SET]; SET is cifar10 (prepared) unless given. EPOCHS, LONG_EPOCHS and
# TICKET_EPOCHS make the trainings of results/prune.sh longer than a few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 set=${2:-cifar10}
kept=results/${set}_prune_gpu
mkdir -p "$kept"
bash results/prune.sh "$data" "$set" runs/prune
for run in runs/prune/*/; do
  name=$(basename "$run")
  python -m train.report "$run" --json "$kept/$name.json"
done
python -m train.prune curve "$kept"/gradual_*.json "$kept"/one_shot_*.json --picture "$kept/curve.png"
python -m train.prune cifar10_resnet56_channels --data.name "$set" --data.dir "$data" --out runs/prune/resnet56_channels
python -m train.prune report runs/prune/resnet56_channels --json "$kept/resnet56_channels.json" \
  --picture "$kept/resnet56_channels.png"
bash results/prune_latency.sh "$data" "$set" runs/prune/resnet18 "$kept/resnet18_half_channels.json"
