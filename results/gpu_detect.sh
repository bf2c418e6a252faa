#!/usr/bin/env bash
# Detection on a GPU: bccd_fasterrcnn and raccoon_fasterrcnn whole, with the preset's ResNet-18 and with a ResNet-50, their
# pages, torchvision's own training for as long, and detection_speed: writes results/detection_gpu/.
# Usage: bash results/gpu_detect.sh DATA_DIR [INIT18 [INIT50]]; DATA_DIR has bccd and raccoon prepared, INIT18 and INIT50 are
# pretrained backbones for --init, `none` without one.
# Each part has its own timeout, MINUTES (10). SMALL=1 makes every part tiny, to try the script on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
data=$1 init18=${2:-none} init50=${3:-none} minutes=${MINUTES:-10}
kept=results/detection_gpu
mkdir -p "$kept"
say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
part() { timeout "$((minutes * 60))" "$@" || echo "FAILED: $*" | tee -a "$kept/failed.txt"; }
if [ -n "${SMALL:-}" ]; then
  tiny=(--data.min-size 64 --data.max-size 96 --data.fraction 0.1 --steps 2 --eval-every 1 --features 16 --hidden 16)
  theirs=(--data.min-size 64 --data.max-size 96 --data.fraction 0.1 --features 16 --hidden 16)
  speed=(--small --seconds 0.1) models=resnet18
else
  tiny=() theirs=() speed=() models="resnet18 resnet50"
fi

for set in bccd raccoon; do
  for model in $models; do
    init=$init18
    [ "$model" = resnet18 ] || init=$init50
    from=()
    [ "$init" = none ] || from=(--init "$init")
    run=runs/${set}_fasterrcnn_$model
    say "$set, $model"
    part python -m train.detect "${set}_fasterrcnn" --model "$model" --data.dir "$data" "${from[@]}" "${tiny[@]}" --out "$run"
    part python -m train.report "$run" --json "$kept/${set}_$model.json"
    part python -m train.detect report "$run" --out "$kept/${set}_$model.html"

    # As many minutes as our training took.
    took=$(python -c 'import json,sys; print(json.load(open(sys.argv[1]))["seconds"] / 60)' "$run/result.json" 2>/dev/null || echo 1)
    say "$set, $model, by torchvision in $took minutes"
    part python results/torchvision_detect.py "${set}_fasterrcnn" --model "$model" --data.dir "$data" "${from[@]}" "${theirs[@]}" \
      --minutes "$took" --out "$kept/${set}_${model}_torchvision.json"
  done
done

say "speed"
part python results/detection_speed.py "$kept/speed.json" "${speed[@]}"
say "done"
[ ! -s "$kept/failed.txt" ]
