#!/usr/bin/env bash
# The runs of results/cifar10_jpeg_*, again on the real CIFAR-10 with the same budgets on two CPU cores.
#   bash results/cifar10_cpu.sh DATA_DIR [PART...]
# Parts, the most visible first, with the minutes that the old run files give (their machines were not idle):
#   ten_epochs      28  ResNet-20 (17 on a second machine, with oneDNN)
#   simclr          61  SimCLR 31, supervised training with as many passes 30
#   prune           98  12 runs of 3.5, dense 3.4, six epochs 15 and 17, rewinding 9, fresh weights 10
#   against_torch   54  three epochs, seeds 0 to 2: JAX 8, 9, 7, PyTorch 5, 10, 15 (extra parity)
#   latency          ?  a ResNet-18 with half of its channels: speed only, on an idle machine (not in the old files)
#   switch           0  only when named, after all of the above: the pages take the new runs, and the old ones are deleted
# Without PART all but `switch` run. If it is stopped, the same command continues. Files name DATA_DIR as it is given here:
# a path relative to the repository, such as `data`, says nothing about this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1
shift
runs=runs/cifar10_cpu torch=results/cifar10_resnet20_against_torch simclr=results/cifar10_simclr_resnet20
prune=results/cifar10_prune
set=(--data.name cifar10 --data.dir "$data")

# keep RUN FOLDER [NAME]: publish a finished run.
keep() {
  mkdir -p "$2"
  python -m train.report "$1" --json "$2/${3:-$(basename "$1")}.json"
}

ten_epochs() {
  local run=$runs/jax_10_epochs_seed0
  python -m train cifar10_resnet20 "${set[@]}" --epochs 10 --seed 0 --out "$run"
  keep "$run" "$torch"
  python -m train.report "$run" --picture "$torch/curve.png"
}

simclr() {
  python -m pretrain cifar10_simclr_resnet20 "${set[@]}" --out "$runs/simclr"
  keep "$runs/simclr" "$simclr"
  python -m pretrain.report "$runs/simclr" --picture "$simclr/curve.png"
  python -m train cifar10_resnet20 "${set[@]}" --epochs 14 --out "$runs/supervised"
  keep "$runs/supervised" "$simclr"
}

prune() {
  local name run
  bash results/prune.sh "$data" cifar10 "$runs/prune"
  for run in "$runs"/prune/*/; do
    name=$(basename "$run")
    keep "$runs/prune/$name" "$prune"
  done
  python -m train.prune curve "$prune"/gradual_*.json "$prune"/one_shot_*.json --picture "$prune/curve.png"
}

against_torch() {
  local seed
  for seed in 0 1 2; do
    python -m train cifar10_resnet20 "${set[@]}" --epochs 3 --seed "$seed" --out "$runs/jax_seed$seed"
    keep "$runs/jax_seed$seed" "$torch"
    [ -e "$torch/torch_seed$seed.json" ] || python -m tests.reference.torch_train --name cifar10 --data-dir "$data" \
      --epochs 3 --seed "$seed" --result "$torch/torch_seed$seed.json"
  done
}

latency() {
  bash results/prune_latency.sh "$data" cifar10 "$runs/half" results/speed/prune_resnet18_cifar_half_channels.json
}

# What remains to do by hand: the sentences about JPEG, and the machines that the pages name.
switch() {
  sed -i -E 's/"cifar10_jpeg_[a-z0-9_]+"  # ([a-z0-9_]+)/"\1"/' results/figures.py
  local pages=(README.md results/README.md train/prune/presets.py pretrain/presets.py)
  sed -i 's/cifar10_jpeg_resnet20/cifar10_resnet20_against_torch/g; s/cifar10_jpeg/cifar10/g' "${pages[@]}"
  rm -r results/cifar10_jpeg_*
  python -m results
  grep -n -i -E 'jpeg|re-encoded|AMD EPYC|Xeon' "${pages[@]}" || true
}

[ $# -gt 0 ] || set -- ten_epochs simclr prune against_torch latency
for part in "$@"; do
  case $part in
    ten_epochs | simclr | prune | against_torch | latency | switch) "$part" ;;
    *) echo "error: $part is not one of ten_epochs simclr prune against_torch latency switch" >&2 && exit 2 ;;
  esac
done
