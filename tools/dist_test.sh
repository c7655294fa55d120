#!/usr/bin/env bash
# Evaluates with several processes on one or more machines, through torchrun.
set -euo pipefail

usage() {
    cat >&2 <<TEXT
usage: [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1] [PORT=…] $0 CONFIG CHECKPOINT GPUS [arguments of test.py]
  PYTHON names another interpreter than python.
  GPUS is the number of processes on this machine; without a GPU they run on the CPU.
  With NNODES > 1, run it on every machine with the same MASTER_ADDR and PORT (29500 unless set).
TEXT
    exit 2
}

[[ $# -ge 3 && $3 =~ ^[1-9][0-9]*$ ]] || usage
config=$1
checkpoint=$2
gpus=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" test.py "$gpus" "$config" "$checkpoint" --launcher pytorch "$@"
