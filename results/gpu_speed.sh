#!/usr/bin/env bash
# The speed of compiled steps on one GPU, and PyTorch's beside it: writes results/gpu_speed/.
# Usage: bash results/gpu_speed.sh [DATA_DIR]   with a prepared cifar10 in DATA_DIR also times the 50-epoch run.
# SMALL=1 makes every part tiny, to try the script itself on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=results/gpu_speed
mkdir -p "$out"
if [ -n "${SMALL:-}" ]; then
  big=(--model resnet8 --classes 10 --image-size 16) cifar=(--model resnet8 --image-size 16) batches="8 16" wide=16
  few=(--steps 2 --repeats 2 --warmup 1) cases=(--model none) detection=(--small --seconds 0.1)
  tiny=(--model resnet8 --width 8 --batch 64 --data.fraction 0.02 --epochs 2)
else
  big=(--model resnet50 --classes 1000 --image-size 224) cifar=(--model resnet18_cifar)
  batches="128 256 384 512 768 1024" wide=1024 few=(--steps 20 --repeats 5) cases=() tiny=() detection=()
fi
say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
measure() { python -m "$1" "${few[@]}" --out "$out" "${@:2}" > "$out/last.json" || echo "FAILED: $*" | tee -a "$out/failed.txt"; }
bench() { measure train.bench "$@"; }
rate() { python -c 'import json,sys; print(json.loads(open(sys.argv[1]).read().splitlines()[-1])["images_per_second"])' "$out/last.json" 2>/dev/null || echo 0; }

say "ResNet-50, 224 px: which batch?"
best=0 best_batch=0
for batch in $batches; do
  bench "${big[@]}" --batch "$batch" --no-shares
  now=$(rate)
  echo "batch $batch: $now images/s"
  if python -c "exit(not $now > $best)"; then best=$now best_batch=$batch; fi
done
echo "$best_batch" > "$out/best_batch.txt"

say "where its time goes, and a profile"
bench "${big[@]}" --batch "$best_batch" --profile "$out/profile"

say "what each choice is worth: A is the default, B the change"
bench "${big[@]}" --batch "$best_batch" --versus "--no-donate"
bench "${big[@]}" --batch "$best_batch" --versus "--dtype float32"
if [ -z "${SMALL:-}" ]; then
  for option in xla_gpu_force_conv_nhwc=true xla_gpu_force_conv_nchw=true xla_gpu_enable_triton_gemm=false \
    xla_gpu_enable_latency_hiding_scheduler=true xla_gpu_autotune_level=5 xla_gpu_graph_level=0; do
    bench "${big[@]}" --batch "$best_batch" --versus "--xla $option"
  done
fi

say "CIFAR: supervised, SimCLR, augmentation, input"
bench "${cifar[@]}" --batch "$wide"
measure pretrain.bench "${cifar[@]}" --batch "$((wide / 2))"
bench "${cifar[@]}" --batch "$wide" --task augment
bench "${cifar[@]}" --batch "$wide" --task input

if [ $# -gt 0 ]; then
  say "the loop against its single step: several steps per call, validation and checkpoints every epoch"
  for steps in 8 32; do
    python results/loop_rate.py 3 cifar10_resnet18_50ep --data.name cifar10 --data.dir "$1" --epochs 4 "${tiny[@]}" --steps-per-call "$steps" \
      > "$out/loop_resnet18_cifar_$steps.json" || echo "FAILED: loop" | tee -a "$out/failed.txt"
  done
fi

say "PyTorch on the same card: eager and compiled, channels_last, bf16"
python -m tests.reference.torch_bench --compiled --blocks 5 "${cases[@]}" --result "$out/torch.json" || echo "FAILED: torch" | tee -a "$out/failed.txt"

say "detection: a step, a predicted image, NMS and ROIAlign, against torchvision"
timeout 1200 python results/detection_speed.py "$out/detection.json" "${detection[@]}" || echo "FAILED: detection" | tee -a "$out/failed.txt"

if [ $# -gt 0 ]; then
  say "50 epochs"
  bash results/gpu.sh "$1" cifar10 "${tiny[@]}"
fi
rm -f "$out/last.json"
say "done"
[ ! -s "$out/failed.txt" ]
