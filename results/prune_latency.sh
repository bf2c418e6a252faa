#!/usr/bin/env bash
# A ResNet-18 (CIFAR stem) with half of its channels: parameters, multiply-adds, bytes, latency interleaved with that of the dense one.
#   bash results/prune_latency.sh DATA_DIR SET FOLDER JSON
# Both are trained for a few steps only, as what a network has learned does not change its speed: accuracies in JSON say
# nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m train.prune cifar10_resnet56_channels --model resnet18_cifar --data.dir "$1" --data.name "$2" --steps 4 \
  --prune.schedule one_shot --prune.sparsity 0.5 --prune.epochs 0.01 --prune.lr 0.001 --out "$3"
python -m train.prune report "$3" --json "$4"
