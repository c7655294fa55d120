#!/usr/bin/env bash
# Trains with several processes on one or more machines, through torchrun.
set -euo pipefail

usage() {
    cat >&2 <<TEXT
usage: [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1] [PORT=…] $0 CONFIG GPUS [arguments of train.py]
  PYTHON names another interpreter than python.
  GPUS is the number of processes on this machine; without a GPU they run on the CPU.
  With NNODES > 1, run it on every machine with the same MASTER_ADDR and PORT (29500 unless set).
  PET_MAX_RESTARTS=3 … --resume: on one machine, a process that dies is started again, with the others.
TEXT
    exit 2
}

[[ $# -ge 2 && $2 =~ ^[1-9][0-9]*$ ]] || usage
config=$1
gpus=$2
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" train.py "$gpus" "$config" --launcher pytorch "$@"
