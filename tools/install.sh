#!/usr/bin/env bash
# Makes the Python environment that everything here runs in, or checks the one there is.
#
#   bash tools/install.sh                            .venv in this checkout, with the pinned requirements
#   MMPROTUNE_STACK=openmmlab bash tools/install.sh  .venv-openmmlab: torch 2.1, mmcv 2.1 and NumPy 1
#   MMPROTUNE_STACK=onedl bash tools/install.sh      .venv-onedl: the onedl-* forks of the libraries
#   MMPROTUNE_ENV=current bash tools/install.sh      the active Python as it is: checked, never changed
#
# PYTHON=… picks the interpreter. tools/quickstart.sh and tools/run_tests.sh source this file and
# call prepare_environment, which leaves the interpreter to run in $ENV_PYTHON.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
CANDIDATES='python3.11 python3.10 python3.12 python3.9 python3.13 python3' # 3.11 is tested most

say() { printf 'install: %s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# prepare_environment [MODULE...]: sets ENV_PYTHON to an interpreter that has all the project needs.
# MODULE: what the caller imports besides; only MMPROTUNE_ENV=current can lack it.
# shellcheck disable=SC2120
prepare_environment() {
    case ${MMPROTUNE_ENV:-venv} in
        venv)
            use_stack "${MMPROTUNE_STACK:-pinned}"
            ENV_PYTHON=$VENV/bin/python
            lock
            ensure_venv
            exec 9<&-
            ;;
        current)
            [[ ${MMPROTUNE_STACK:-pinned} == pinned ]] ||
                die "MMPROTUNE_STACK=$MMPROTUNE_STACK makes an environment and MMPROTUNE_ENV=current" \
                    'uses the one there is: unset one of them'
            ENV_PYTHON=${PYTHON:-$(command -v python || command -v python3)} ||
                die 'MMPROTUNE_ENV=current, but there is no active python: set PYTHON'
            check_current "$@"
            ;;
        *)
            die "unknown MMPROTUNE_ENV '$MMPROTUNE_ENV': expected 'venv' (default; makes .venv)" \
                "or 'current' (the active Python as it is)"
            ;;
    esac
}

# use_stack NAME: which versions of the libraries, and where. They overwrite each other's files (the
# forks have the import names of what they are forked from), so that each stack has its own folder:
# beside .venv, or in $STACK_FOLDER, which tools/check_stacks.sh sets.
use_stack() {
    STACK=$1
    MMCV=requirements/mmcv.txt
    STANDARD=17 # of C++, which mmcv asks for
    case $STACK in
        pinned)
            RUNTIME=requirements/runtime.txt
            STANDARD=20                        # which PyTorch's headers want
            SUITABLE='3.9 3.10 3.11 3.12 3.13' # MMEngine needs pkgutil.find_loader, which 3.14 dropped
            ;;
        openmmlab)
            RUNTIME=requirements/stacks/openmmlab.txt
            SUITABLE='3.9 3.10 3.11' # torch 2.1 has no others
            ;;
        onedl)
            RUNTIME=requirements/stacks/onedl.txt
            MMCV=requirements/stacks/onedl-mmcv.txt
            SUITABLE='3.10 3.11 3.12'
            ;;
        *)
            die "unknown stack '$STACK' (MMPROTUNE_STACK): expected 'pinned' (default), 'openmmlab'" \
                "(torch 2.1, NumPy 1) or 'onedl' (the onedl-* forks)"
            ;;
    esac
    VENV=$ROOT/.venv
    [[ $STACK == pinned ]] || VENV=${STACK_FOLDER:+$STACK_FOLDER/$STACK}
    VENV=${VENV:-$ROOT/.venv-$STACK}
    VENV_NAME=${VENV#"$ROOT"/}
    LOG=$VENV/install.log
    STAMP=$VENV/mmprotune-installed
    WORK=$VENV/tmp
}

# Two installations in one checkout must not run at once; the lock is held on this very file.
lock() {
    exec 9<"$ROOT/tools/install.sh"
    command -v flock >/dev/null || return 0
    flock -n 9 && return 0
    say 'another installation runs in this checkout: waiting for it'
    flock 9
}

# --- the environment there is -----------------------------------------------------------------

check_current() {
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    local lacks
    # shellcheck disable=SC2016
    lacks=$("$ENV_PYTHON" -W ignore -c '
import importlib, sys
found = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:  # a version gate may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{name} ({reason})", end="; ")
' torch torchvision mmengine mmcv.ops mmdet mmprotune "$@") ||
        die "MMPROTUNE_ENV=current: $ENV_PYTHON does not run"
    [[ -z $lacks ]] || die "MMPROTUNE_ENV=current, but $ENV_PYTHON lacks: ${lacks%; }." \
        'Install it there, or unset MMPROTUNE_ENV to have .venv made'
    nms_runs || die "mmcv.ops.nms of $ENV_PYTHON does not run: $NMS_SAYS"
    say "using $ENV_PYTHON as it is"
}

# True if mmcv's compiled ops are there and right, on the GPU too if there is one.
nms_runs() {
    NMS_SAYS=$("$ENV_PYTHON" -W ignore -c '
import sys
import torch
from mmcv.ops import nms

boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]])
scores = torch.tensor([0.7, 0.9, 0.8])
for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
    kept = nms(boxes.to(device), scores.to(device), iou_threshold=0.5)[1].tolist()
    if kept != [1, 2]:
        sys.exit(f"nms on {device} kept boxes {kept} instead of [1, 2]")
' 2>&1) && return 0
    NMS_SAYS=${NMS_SAYS##*$'\n'}
    NMS_SAYS=${NMS_SAYS:-Python was killed}
    return 1
}

# --- the environment that is made ---------------------------------------------------------------

ensure_venv() {
    local have want
    if [[ ! -e $VENV ]]; then
        install_all
        return
    fi
    [[ -f $VENV/pyvenv.cfg ]] || die "$VENV is there, but is no virtual environment: move it away"
    if ! have=$(python_version "$ENV_PYTHON"); then
        say "$VENV_NAME is broken (its Python does not run): making it anew"
        rm -rf "$VENV"
        install_all
        return
    fi
    if [[ -n ${PYTHON:-} ]]; then
        want=$(pick_python)
        want=$(python_version "$want")
        [[ $have == "$want" ]] ||
            die "PYTHON=$PYTHON is Python $want, but $VENV_NAME has $have: remove $VENV_NAME or unset PYTHON"
    fi
    is_suitable "$have" || die "$VENV_NAME has Python $have: need one of $SUITABLE; remove $VENV_NAME"
    if [[ -f $STAMP && $(head -n 1 "$STAMP") == "$(wanted_state)" ]]; then
        if nms_runs; then
            say "ready: $ENV_PYTHON"
            return
        fi
        say "mmcv.ops.nms does not run any more ($NMS_SAYS): repairing $VENV_NAME"
    fi
    install_all
}

# What the environment is made from: the pins, the packaging, its place and its Python.
wanted_state() {
    {
        cat "$ROOT"/requirements/*.txt
        [[ $STACK == pinned ]] || cat "$ROOT/$RUNTIME" "$ROOT/$MMCV"
        cat "$ROOT/setup.py" "$ROOT/pyproject.toml"
        printf '%s\n' "$ROOT"
    } | "$ENV_PYTHON" -c '
import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest())'
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_suitable() { [[ " $SUITABLE " == *" $1 "* ]]; }

pick_python() {
    local name version seen=''
    if [[ -n ${PYTHON:-} ]]; then
        version=$(python_version "$PYTHON") || die "PYTHON=$PYTHON does not run"
        is_suitable "$version" || die "PYTHON=$PYTHON is Python $version: need one of $SUITABLE"
        printf '%s' "$PYTHON"
        return
    fi
    for name in $CANDIDATES; do
        version=$(python_version "$name") || continue
        if is_suitable "$version"; then
            printf '%s' "$name"
            return
        fi
        seen=" (found $name, which is $version)"
    done
    die "no suitable Python$seen: install one of $SUITABLE, or name it with PYTHON=…"
}

# In a subshell: TMPDIR is put on the disk that was checked, and only here.
install_all() (
    python=$ENV_PYTHON
    [[ -x $python ]] || python=$(pick_python)
    if [[ $python != "$ENV_PYTHON" ]] || ! "$python" -c 'import torch' 2>/dev/null; then
        need_disk
        cached_wheel "$python" || need_compiler "$python"
    fi
    if [[ $python != "$ENV_PYTHON" ]]; then
        say "making $VENV_NAME with Python $(python_version "$python")"
        "$python" -m venv "$VENV" >/dev/null 2>&1 || {
            rm -rf "$VENV"
            die "$python cannot make $VENV_NAME: its venv module is missing" \
                '(Debian, Ubuntu: apt install python3-venv) or the place is not writable'
        }
    fi
    built=''
    [[ ! -f $STAMP ]] || built=$(sed -n 2p "$STAMP")
    rm -f "$STAMP"
    : >"$LOG"
    export TMPDIR=$WORK
    mkdir -p "$WORK"
    trap 'rm -rf "$WORK"' EXIT

    say "installing the pinned requirements (details: $LOG)"
    pip_run install -r "$RUNTIME" -r requirements/tests.txt -r requirements/build.txt
    key=$(wheel_key)
    if [[ $built != "$key" ]] || ! nms_runs; then
        install_mmcv "$key"
    fi
    MMPROTUNE_STACK=$STACK pip_run install --no-deps --no-build-isolation -e .
    "$ENV_PYTHON" -W ignore -c 'import mmprotune' >>"$LOG" 2>&1 ||
        die "mmprotune does not import: $(tail -n 1 "$LOG")"
    printf '%s\n' "$(wanted_state)" "$key" >"$STAMP.part"
    mv "$STAMP.part" "$STAMP"
    say "done: $ENV_PYTHON"
)

need_disk() {
    local need=3 place=${VENV%/*} free
    # PyTorch for Linux x86_64 comes with CUDA's libraries: 3 GB to download, 6 GB unpacked.
    [[ $(uname -sm) != 'Linux x86_64' ]] || need=10
    free=$(df -Pk "$place" | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free >= need)) || die "the disk of $place has $free GB free: the first installation needs $need GB"
}

# need_compiler PYTHON
need_compiler() {
    local cxx=${CXX:-c++} header=optional headers
    ((STANDARD == 17)) || header=concepts
    $cxx "-std=c++$STANDARD" -x c++ -fsyntax-only - <<<"#include <$header>" >/dev/null 2>&1 ||
        die "no C++$STANDARD compiler ('$cxx' cannot): mmcv's ops must be compiled;" \
            'install g++ 10 or newer (Debian, Ubuntu: apt install g++), or set CXX'
    headers=$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [[ -f $headers/Python.h ]] ||
        die "no Python.h in $headers: mmcv's ops must be compiled; install Python's headers" \
            "(Debian, Ubuntu: apt install python$(python_version "$1")-dev)"
}

# pip_run ARGS...: pip in the environment, quiet but for a line now and then; a failure is told in one line.
pip_run() {
    local rc=0
    cd "$ROOT"
    with_progress pip_progress \
        "$ENV_PYTHON" -m pip --disable-pip-version-check --no-input "$@" || rc=$?
    ((rc == 0)) && return 0
    if grep -q 'No space left on device' "$LOG"; then
        die "no space left on the disk (details: $LOG)"
    elif grep -qE 'connection broken by|Failed to establish|name resolution|timed out' "$LOG"; then
        die "no network: pip cannot reach its package index (details: $LOG)"
    fi
    die "pip $1 failed: $(first_error "$rc") (details: $LOG)"
}

# first_error RC: what the log says first that went wrong, short enough for one line.
first_error() {
    local line
    if (($1 > 128)); then
        printf 'it was killed; if memory was short, try MAX_JOBS=1'
        return
    fi
    line=$(grep -m 1 -E '(ERROR|[Ee]rror):' "$LOG" || tail -n 1 "$LOG")
    printf '%s' "${line:0:200}"
}

pip_progress() {
    grep -oE '(Collecting|Downloading|Using cached|Installing|Building) [^ (]+' "$LOG" | tail -n 1 |
        sed 's/Installing collected/installing the packages/'
}

# with_progress STATUS COMMAND...: COMMAND with its output in the log, STATUS's line every while.
# The reporter is what runs in the background, so that Ctrl-C reaches COMMAND.
with_progress() {
    local status=$1 rc=0 reporter
    shift
    report "$status" 9<&- & # without the lock: it may live a second longer than this script
    reporter=$!
    "$@" >>"$LOG" 2>&1 || rc=$?
    kill "$reporter" 2>/dev/null || true
    wait "$reporter" 2>/dev/null || true
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
    return "$rc"
}

report() {
    local start=$SECONDS every=20 next line
    [[ ! -t 2 ]] || every=2
    next=$((start + every))
    # Short naps, so that none is left behind for long when this is stopped.
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        ((SECONDS >= next)) || continue
        next=$((SECONDS + every))
        line="$("$1" || true) ($((SECONDS - start)) s)"
        if [[ -t 2 ]]; then
            printf '\r\033[Kinstall: %s' "$line" >&2
        else
            say "$line"
        fi
    done
}

# --- mmcv with its ops --------------------------------------------------------------------------

cache_root() {
    local root=${XDG_CACHE_HOME:-${HOME:-}/.cache}/mmprotune
    # A home that is missing or read-only is no reason to stop.
    if ! mkdir -p "$root" 2>/dev/null || [[ ! -w $root ]]; then
        root=$VENV/cache
        mkdir -p "$root"
    fi
    (cd "$root" && pwd)
}

mmcv_name() { sed -nE 's/^([^ =#]+)==.*/\1/p' "$ROOT/$MMCV"; } # of the distribution: mmcv, onedl-mmcv
mmcv_version() { sed -nE 's/^[^ =#]+==([^ ]+).*/\1/p' "$ROOT/$MMCV"; }
mmcv_file() { mmcv_name | tr - _; } # what the names of its archives begin with

# cached_wheel PYTHON: true if some wheel for PYTHON and the pinned versions is there. Before torch
# is installed the CUDA half of the key is unknown, so this only spares asking for a compiler early.
cached_wheel() {
    local root=${XDG_CACHE_HOME:-${HOME:-}/.cache}/mmprotune
    compgen -G "$root/python$(python_version "$1")-torch*-$(mmcv_name)$(mmcv_version)-*/$(mmcv_file)-*.whl" \
        >/dev/null
}

# Everything that the compiled ops depend on.
wheel_key() {
    "$ENV_PYTHON" -W ignore -c '
import os, platform, sys
import torch

if torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1":
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "_".join("%d.%d" % c for c in sorted(cards))
    ops = "cudaops" + archs.replace(";", "_").replace(" ", "_")
else:
    ops = "cpuops"
print(sys.argv[1], "torch" + torch.__version__, sys.argv[2], "cuda" + str(torch.version.cuda), ops,
      platform.machine(), sep="-")
' "python$(python_version "$ENV_PYTHON")" "$(mmcv_name)$(mmcv_version)"
}

# install_mmcv KEY: from the cache if it works, else built.
install_mmcv() {
    local folder name
    folder=$(cache_root)/$1
    name=$(mmcv_file)
    if compgen -G "$folder/$name-*.whl" >/dev/null; then
        say "$(mmcv_name) $(mmcv_version) with ops: from the cache ($folder)"
        if "$ENV_PYTHON" -m pip install --disable-pip-version-check --no-deps --force-reinstall \
            "$folder/$name"-*.whl >>"$LOG" 2>&1 && nms_runs; then
            return 0
        fi
        say 'the cached wheel does not work here: building it anew'
        rm -rf "$folder"
    fi
    build_mmcv "$1" "$folder"
    pip_run install --no-deps --force-reinstall "$folder/$name"-*.whl
    nms_runs || die "mmcv was built, but mmcv.ops.nms does not run: $NMS_SAYS"
}

# build_mmcv KEY FOLDER
build_mmcv() {
    local name tree wheel cuda_home rc=0
    name=$(mmcv_file)
    need_compiler "$ENV_PYTHON"
    if [[ $1 == *-cudaops* ]]; then
        cuda_home=$("$ENV_PYTHON" -c 'from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME or "")')
        [[ -n $cuda_home ]] || die "there is a GPU, but no nvcc to compile mmcv's GPU ops: install the" \
            "CUDA toolkit (or set CUDA_HOME), or set CUDA_VISIBLE_DEVICES= to use the CPU only"
    else
        export CUDA_VISIBLE_DEVICES='' # so that what is built is what the key says
    fi
    pip_run download --no-deps --no-binary "$(mmcv_name)" --no-build-isolation \
        --dest "$WORK" -r "$MMCV"
    tar -xzf "$WORK/$name"-*.tar.gz -C "$WORK"
    tree=$(compgen -G "$WORK/$name-*/")
    ((STANDARD == 17)) || raise_standard "$tree/setup.py"

    say "building $(mmcv_name) $(mmcv_version) with ops against the installed PyTorch"
    BUILD=$tree/build
    rm -rf "$BUILD"
    export MMCV_WITH_OPS=1 CFLAGS='-g0 -O2' CXXFLAGS='-g0 -O2' PATH=$VENV/bin:$PATH
    export MAX_JOBS=${MAX_JOBS:-$(jobs_that_fit)}
    with_progress build_progress "$ENV_PYTHON" -m pip --disable-pip-version-check \
        wheel -v --no-deps --no-build-isolation --wheel-dir "$WORK/wheel" "$tree" || rc=$?
    ((rc == 0)) || die "mmcv does not compile: $(first_error "$rc") (details: $LOG)"
    wheel=$(compgen -G "$WORK/wheel/$name-*.whl")
    # Without torch in sight mmcv's setup.py leaves the ops out and still succeeds.
    # (No grep -q: it would stop reading early, and pipefail would count that.)
    "$ENV_PYTHON" -m zipfile -l "$wheel" | grep '_ext.*\.so' >>"$LOG" ||
        die "mmcv was built without its ops (details: $LOG)"
    # Under its name only when complete: another checkout may be reading the cache.
    mkdir -p "$2"
    cp "$wheel" "$2/.part.$$"
    mv "$2/.part.$$" "$2/${wheel##*/}"
    say "kept the wheel in $2"
}

# raise_standard SETUP_PY: current PyTorch's headers want C++20, mmcv's setup.py asks for C++17.
raise_standard() {
    grep -q -- '-std=c++17' "$1" ||
        die "$1 does not ask for -std=c++17: this is not the mmcv that tools/install.sh knows"
    sed 's/-std=c++17/-std=c++20/g' "$1" >"$1.new"
    mv "$1.new" "$1"
}

# Compiling against PyTorch takes up to 2 GB a file.
jobs_that_fit() {
    "$ENV_PYTHON" -c '
import os, psutil
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(max(1, min(cores, psutil.virtual_memory().available // 2**31)))'
}

build_progress() {
    local ready total plan
    plan=$(find "$BUILD" -name build.ninja 2>/dev/null | head -n 1)
    if [[ -z $plan ]]; then
        printf 'preparing to compile'
        return
    fi
    ready=$(find "$BUILD" -name '*.o' | wc -l)
    total=$(grep -c '^build .*\.o:' "$plan")
    printf 'compiled %d of %d files' "$ready" "$total"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    (($# == 0)) || die "unexpected '$*': tools/install.sh takes no arguments, but PYTHON, MMPROTUNE_ENV and" \
        MMPROTUNE_STACK
    # shellcheck disable=SC2119
    prepare_environment
fi
