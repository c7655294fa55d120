#!/usr/bin/env bash
# Everything that only a GPU can show, in parts that take less than nine minutes each on a machine
# with one: tests, then kept bytes, peak memory, step and inference times.
#
#   bash tools/gpu_check.sh [--out DIR] [--device cuda|cpu] [--part N[,N...]]
#
# A part that was finished is skipped, so that the command goes on where it was cut off; --part runs
# some parts anew, in the order given. --device cpu runs the same commands on small images, to see that they run at all.
# Needs no network once set up: MMPROTUNE_ENV=current with torch, mmcv and the hosts installed.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

out=work_dirs/gpu_check device=cuda only=
usage() {
    echo "usage: gpu_check.sh [--out DIR] [--device cuda|cpu] [--part N[,N...]]," \
        "N from 1 to ${#PARTS[@]}" >&2
    exit 2
}

MODELS=(mask_rcnn_r50_protune_coco mask_rcnn_swin-t_protune_coco upernet_r50_protune_ade20k
    upernet_swin-t_protune_ade20k)
BACKBONES=(mask_rcnn_r50_protune_coco mask_rcnn_swin-t_protune_coco
    mask_rcnn_convnext-t_protune_coco upernet_vit-b_protune_ade20k)

# What the hosts have themselves to keep less; a backbone that lacks one is told.
HOSTS=(with_cp naive_with_cp efficient_conv_bn_eval)

# Each part is a name and a command; benchmarks write one JSON file each.
PARTS=('tests')
for batch in 2 8; do
    for amp in '' bfloat16; do PARTS+=("backbones-$batch-${amp:-float32}"); done
done
for model in "${MODELS[@]}"; do
    for batch in 2 8; do
        for amp in '' bfloat16; do PARTS+=("$model-$batch-${amp:-float32}"); done
    done
done
PARTS+=('compiled-2-bfloat16' 'ablation')

while (($#)); do
    case $1 in
        --out) out=${2:?} ;;
        --device) device=${2:?} ;;
        --part) only=${2:?} ;;
        *) usage ;;
    esac
    shift 2
done
[[ $device == cuda || $device == cpu ]] || usage
[[ -z $only || $only =~ ^[0-9]+(,[0-9]+)*$ ]] || usage
for part in ${only//,/ }; do
    ((part >= 1 && part <= ${#PARTS[@]})) || usage
done

prepare_environment pytest hypothesis
cd "$ROOT"
mkdir -p "$out"
if [[ $device == cuda ]]; then
    "$ENV_PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        die 'PyTorch finds no CUDA device; --device cpu runs the same commands without one'
    "$ENV_PYTHON" -c 'import torch, mmcv.ops; b = torch.rand(4, 4, device="cuda")
mmcv.ops.nms(b, b[:, 0], 0.5)' ||
        die "mmcv's CUDA operators do not run here: build it with MMCV_WITH_OPS=1 FORCE_CUDA=1"
    size=1024 steps=5
else
    size=64 steps=1
fi

benchmark() { # NAME BATCH AMP OPTIONS... CONFIGS...
    local name=$1 batch=$2 amp=$3
    shift 3
    [[ $amp == float32 ]] || set -- --amp "$amp" "$@"
    "$ENV_PYTHON" tools/analysis_tools/benchmark_training.py "$@" --device "$device" \
        --batch-size "$batch" --size "$size" --steps "$steps" --json "$out/$name.json"
}

run_part() {
    local name=$1 rest amp batch
    case $name in
        tests)
            [[ $device == cuda ]] || export MMPROTUNE_GPU_TESTS=cpu
            "$ENV_PYTHON" -m pytest -m gpu -q tests/test_gpu.py
            return
            ;;
        ablation)
            benchmark "$name" 2 float32 "${BACKBONES[@]/#/configs/}" --backbone-only --ablate \
                --variants lean
            return
            ;;
    esac
    amp=${name##*-} rest=${name%-*}
    batch=${rest##*-} rest=${rest%-*}
    if [[ $rest == compiled ]]; then
        benchmark "$name" "$batch" "$amp" "${BACKBONES[@]/#/configs/}" --backbone-only \
            --no-inference --variants naive lean compiled budget
    elif [[ $rest == backbones ]]; then
        benchmark "$name" "$batch" "$amp" "${BACKBONES[@]/#/configs/}" --backbone-only \
            --variants full frozen naive lean lora "${HOSTS[@]}"
    else
        # On a CPU, where exp stays in bfloat16, so do boxes, and mmcv's NMS does not take them.
        [[ $device == cuda ]] || amp=float32
        benchmark "$name" "$batch" "$amp" "configs/$rest.py" --variants full frozen naive lean \
            "${HOSTS[@]}"
    fi
}
for i in "${!BACKBONES[@]}"; do BACKBONES[i]+=.py; done

failed=()
parts=${only//,/ }
for part in ${parts:-$(seq ${#PARTS[@]})}; do
    name=${PARTS[part - 1]} done_file=$out/$part.done
    if [[ -z $only && -e $done_file ]]; then
        echo "part $part of ${#PARTS[@]}, $name: done before"
        continue
    fi
    echo "part $part of ${#PARTS[@]}, $name"
    if run_part "$name" >"$out/$name.log" 2>&1; then
        touch "$done_file"
        tail -n 1 "$out/$name.log"
    else
        failed+=("$part ($name)")
        tail -n 5 "$out/$name.log"
    fi
done
((${#failed[@]} == 0)) || die "failed: ${failed[*]}; the logs are in $out"
