#!/usr/bin/env bash
# Pruning of ResNet-20 on images of 32 pixels: how much can go, when, by which score; rewinding against fresh weights.
#   bash results/prune.sh DATA_DIR SET FOLDER
# FOLDER gets a run each; `python -m train.prune report` and results/README.md read them. All but the last two start from the
# ResNet-20 that comes with the project, trained on CIFAR-10. EPOCHS (2) is the budget of each training after pruning, LONG_EPOCHS (6)
# that of the longer ones, TICKET_EPOCHS (4) that of rewinding.
set -euo pipefail
cd "$(dirname "$0")/.."
data=(--data.dir "$1" --data.name "$2")
out=$3

# Each has the same training after, or while, pruning: budget, learning rate, batches.
prune() {
  python -m train.prune cifar10_resnet20_prune "${data[@]}" --init cifar10_resnet20 --prune.lr 0.02 \
    --prune.epochs "$epochs" "$@"
}
at_once=(--prune.schedule one_shot)
# In a training this short gradual pruning ends early, while the learning rate can still repair what it did.
gradual=(--prune.every 25 --prune.end "${END:-0.4}")

epochs=${EPOCHS:-2}
prune "${at_once[@]}" --prune.sparsity 0 --out "$out/dense_trained_on"
for sparsity in 0.9 0.95 0.8 0.5; do
  prune "${gradual[@]}" --prune.sparsity $sparsity --out "$out/gradual_magnitude_$sparsity"
  for score in magnitude random; do
    prune "${at_once[@]}" --prune.sparsity $sparsity --prune.score $score --out "$out/one_shot_${score}_$sparsity"
  done
done

# Three times the training at the highest sparsity: does gradual pruning need more of it?
epochs=${LONG_EPOCHS:-6}
prune "${gradual[@]}" --prune.sparsity 0.95 --out "$out/long_gradual_0.95"
prune "${at_once[@]}" --prune.sparsity 0.95 --out "$out/long_one_shot_0.95"

# The lottery ticket at one sparsity: early weights against fresh ones, under the same masks.
python -m train.prune cifar10_resnet20_prune "${data[@]}" --epochs "${TICKET_EPOCHS:-4}" --prune.schedule iterative \
  --prune.levels 1 --prune.sparsity 0.9 --prune.rewind-epochs 1 --out "$out/rewind_0.9"
python -m train.prune "$out/rewind_0.9/dense" --prune.schedule iterative --prune.levels 1 --prune.sparsity 0.9 \
  --prune.restart reinit --out "$out/reinit_0.9"
