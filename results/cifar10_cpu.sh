#!/usr/bin/env bash
# The runs of ResNet-20 on CIFAR-10 that results/README.md shows, on two CPU cores.
#   bash results/cifar10_cpu.sh DATA_DIR [PART...]
# Parts, with rough minutes:
#   ten_epochs      14  on two cores of an AMD EPYC; the following on one
#   simclr          80  SimCLR, and supervised training with as many passes
#   prune          100  each score and schedule at four sparsities, longer training, rewinding
#   against_torch   50  three epochs, seeds 0 to 2, by JAX and by PyTorch (extra parity)
#   latency          ?  a ResNet-18 with half of its channels: speed only, on an idle machine
# Without PART all run. If it is stopped, the same command continues. Files name DATA_DIR as it is given here: a path relative
# to the repository, such as `data`, says nothing about this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1
shift
runs=runs/cifar10_cpu torch=results/cifar10_resnet20_against_torch simclr=results/cifar10_simclr_resnet20
prune=results/cifar10_prune
set=(--data.name cifar10 --data.dir "$data")

# keep RUN FOLDER: publish a finished run.
keep() {
  mkdir -p "$2"
  python -m train.report "$1" --json "$2/$(basename "$1").json"
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
  local run
  bash results/prune.sh "$data" cifar10 "$runs/prune"
  for run in "$runs"/prune/*/; do
    keep "${run%/}" "$prune"
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

[ $# -gt 0 ] || set -- ten_epochs simclr prune against_torch latency
for part in "$@"; do
  case $part in
    ten_epochs | simclr | prune | against_torch | latency) "$part" ;;
    *) echo "error: $part is not one of ten_epochs simclr prune against_torch latency" >&2 && exit 2 ;;
  esac
done
