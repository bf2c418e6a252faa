#!/usr/bin/env bash
# Pruning of ResNet-20 on images of 32 pixels: how much can go, when, by which score; rewinding against fresh weights.
#   bash results/prune.sh DATA_DIR SET FOLDER [DENSE_RUN]
# FOLDER gets a run each; `python -m train.prune report` and results/README.md read them. Without DENSE_RUN a ResNet-20 is
# trained first. EPOCHS (2) is the budget of each training after pruning, DENSE_EPOCHS (14) that of the dense run.
set -euo pipefail
cd "$(dirname "$0")/.."
data=(--data.dir "$1" --data.name "$2")
out=$3
dense=${4:-$out/dense}
[ -n "${4:-}" ] || python -m train cifar10_resnet20 "${data[@]}" --epochs "${DENSE_EPOCHS:-14}" --out "$dense"

# The same training after, or while, pruning for each: budget, learning rate, batches.
budget=(--prune.epochs "${EPOCHS:-2}" --prune.lr 0.02 --prune.every 25)
python -m train.prune "$dense" "${budget[@]}" --prune.sparsity 0 --prune.schedule one_shot --out "$out/dense_trained_on"
for sparsity in 0.9 0.95 0.8 0.5; do
  # In a training this short gradual pruning ends early, while the learning rate can still repair what it did.
  python -m train.prune "$dense" "${budget[@]}" --prune.sparsity $sparsity --prune.end "${END:-0.4}" \
    --out "$out/gradual_magnitude_$sparsity"
  for score in magnitude random; do
    python -m train.prune "$dense" "${budget[@]}" --prune.sparsity $sparsity --prune.schedule one_shot \
      --prune.score $score --out "$out/one_shot_${score}_$sparsity"
  done
done

# The lottery ticket at one sparsity: early weights against fresh ones, under the same masks.
python -m train.prune cifar10_resnet20_prune "${data[@]}" --epochs "${TICKET_EPOCHS:-4}" --prune.schedule iterative \
  --prune.levels 1 --prune.sparsity 0.9 --prune.rewind-epochs 1 --out "$out/rewind_0.9"
python -m train.prune "$out/rewind_0.9/dense" --prune.schedule iterative --prune.levels 1 --prune.sparsity 0.9 \
  --prune.restart reinit --out "$out/reinit_0.9"
