#!/usr/bin/env bash
# Pretraining on a GPU: cifar10_simclr_resnet18, its curve, its worth frozen and on 1 % and 10 % of the labels, and the
# memory and time of NT-Xent by blocks and whole.
# Usage: bash results/gpu_pretrain.sh DATA_DIR [SET] [more fields]; SET is cifar10 (prepared) unless given. 1,000 epochs
# are the recipe's; `--epochs 200` is a fifth of the time.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 set=${2:-cifar10}
shift $(($# < 2 ? $# : 2))
run=runs/${set}_simclr_resnet18
kept=results/${set}_simclr_resnet18
mkdir -p "$kept"
python -m pretrain cifar10_simclr_resnet18 --data.name "$set" --data.dir "$data" --out "$run" "$@"
python -m train.report "$run" --json "$kept/seed0.json"
python -m pretrain.report "$run" --picture "$kept/curve.png"
python -m pretrain.evaluate "$run" --protocol finetune_1 scratch_1 finetune_10 scratch_10
cp "$run"/evaluation-*.json "$kept"
python -m tests.reference.nt_xent_bench --json "$kept/nt_xent.json"
