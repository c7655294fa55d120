#!/usr/bin/env bash
# Runs the tests, and one short training, on each stack of versions that tools/install.sh can make.
#
#   bash tools/check_stacks.sh                                    all stacks
#   bash tools/check_stacks.sh onedl                              these
#   bash tools/check_stacks.sh openmmlab onedl -- tests/test_lean -x   what follows `--` goes on to pytest
#
# The environments are kept: `pinned` is .venv, the others are in ~/.cache/mmprotune/stacks, one for
# all checkouts. Logs are in work_dirs/stacks. Exit status 0: all passed on all of them.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

ALL=(pinned openmmlab onedl)
FORMAT='%-10s  %-11s  %-36s  %-10s  %7s  %s\n'

main() {
    local name stacks=() rows=() failed=0
    while (($#)) && [[ $1 != -- ]]; do
        stacks+=("$1")
        shift
    done
    (($# == 0)) || shift
    ((${#stacks[@]})) || stacks=("${ALL[@]}")
    for name in "${stacks[@]}"; do
        (use_stack "$name") # refuses an unknown one before there is work to wait for
    done

    STACK_FOLDER=${XDG_CACHE_HOME:-${HOME:-}/.cache}/mmprotune/stacks
    mkdir -p "$STACK_FOLDER" 2>/dev/null || STACK_FOLDER='' # then they are beside .venv
    export STACK_FOLDER
    for name in "${stacks[@]}"; do
        check_stack "$name" "$@" || failed=1
        rows+=("$ROW")
    done
    # shellcheck disable=SC2059
    printf "$FORMAT" stack environment tests training seconds versions
    printf '%s\n' "${rows[@]}"
    return "$failed"
}

# check_stack NAME PYTEST_ARGS...: leaves its line of the table in ROW.
check_stack() {
    local logs=$ROOT/work_dirs/stacks/$1 start=$SECONDS made=ok tests=- training=- versions=- rc=0
    use_stack "$1"
    shift
    mkdir -p "$logs"
    ENV_PYTHON=$VENV/bin/python
    if [[ -n $STACK_FOLDER && $STACK != pinned ]] && command -v flock >/dev/null; then
        exec 8>"$STACK_FOLDER/$STACK.lock"
        flock -n 8 || { say "another check uses $VENV: waiting for it" && flock 8; }
    fi
    # A process of its own: `set -e` would not hold inside a condition.
    if MMPROTUNE_ENV=venv MMPROTUNE_STACK=$STACK bash "$ROOT/tools/install.sh"; then
        versions=$(versions_there)
        say "$STACK: the tests (log: $logs/tests.log)"
        in_stack -m pytest "$@" >"$logs/tests.log" 2>&1 || rc=1
        tests=$(tail -n 1 "$logs/tests.log" | sed -E 's/^=+ //; s/ =+$//; s/ in [0-9].*//')
        say "$STACK: a short training (log: $logs/train.log)"
        training=ok
        train_briefly "$logs" >"$logs/train.log" 2>&1 || training=failed rc=1
    else
        made=failed rc=1
    fi
    [[ ! -e /dev/fd/8 ]] || exec 8>&-
    # shellcheck disable=SC2059
    ROW=$(printf "$FORMAT" "$STACK" "$made" "${tests:0:36}" "$training" "$((SECONDS - start))" "$versions")
    return "$rc"
}

# in_stack ARGS...: the environment's Python in this checkout, without the variables that chose it.
in_stack() (
    cd "$ROOT"
    exec env -u MMPROTUNE_STACK -u MMPROTUNE_ENV -u STACK_FOLDER -u PYTHONPATH "$ENV_PYTHON" "$@"
)

versions_there() {
    in_stack -W ignore -c '
import importlib, platform

names = ("torch", "numpy", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")
print("python", platform.python_version(), *(
    f"{name} {importlib.import_module(name).__version__}" for name in names))' 2>&1 | tail -n 1
}

# train_briefly LOGS: a stock config by its name, wrapped, on drawn images: train, evaluate, save.
train_briefly() {
    local data=$1/shapes run=$1/run images size
    rm -rf "$data" "$run"
    in_stack -c '
import sys
from pathlib import Path

sys.path.insert(0, "tools")
from quickstart_data import write_coco

for split, number in (("train", 8), ("val", 2)):
    write_coco(Path(sys.argv[1]), split, number, 160, seed=0)' "$data" || return
    # Nothing is downloaded: the backbone stays at its random start, and is frozen there.
    local options=(model.backbone.backbone.init_cfg=None model.backbone.freeze=all
        model.bbox_head.num_classes=5 train_cfg.max_epochs=1 randomness.seed=0
        val_evaluator.ann_file="$data/val.json" test_evaluator.ann_file="$data/val.json")
    for images in train val test; do
        size=2
        [[ $images == train ]] || size=1
        options+=("${images}_dataloader.num_workers=0" "${images}_dataloader.persistent_workers=False"
            "${images}_dataloader.dataset.data_root=$data"
            "${images}_dataloader.dataset.ann_file=${images/test/val}.json"
            "${images}_dataloader.dataset.data_prefix.img=${images/test/val}/"
            "${images}_dataloader.dataset.metainfo.classes=(disc,square,triangle,star,cross)"
            "${images}_dataloader.dataset.pipeline.$size.scale=(160,160)")
    done
    in_stack tools/train.py mmdet::retinanet/retinanet_r18_fpn_1x_coco.py --protune \
        --work-dir "$run" --cfg-options "${options[@]}" || return
    [[ -f $run/epoch_1.pth ]]
}

main "$@"
