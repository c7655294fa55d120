#!/usr/bin/env bash
# Trains with several processes on one or more machines, through torchrun.
set -euo pipefail

usage() {
    cat >&2 <<TEXT
usage: [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1] [PORT=…] $0 CONFIG GPUS [arguments of train.py]
  PYTHON names another interpreter than python.
  GPUS is the number of processes on this machine; without a GPU they run on the CPU.
  With NNODES > 1, run it on every machine with the same MASTER_ADDR and PORT (29500 unless set).
TEXT
    exit 2
}

[[ $# -ge 2 && $2 =~ ^[1-9][0-9]*$ ]] || usage
config=$1
gpus=$2
shift 2

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nnodes=${NNODES:-1}
port=${PORT:-}
if [[ -z $port && $nnodes != 1 ]]; then
    port=29500
elif [[ -z $port ]]; then
    # Any free port, so that two jobs on one machine do not meet.
    port=$("${PYTHON:-python}" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
fi

PYTHONPATH="$(dirname "$tools")${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$nnodes" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="$port" \
    --nproc_per_node="$gpus" \
    "$tools/train.py" "$config" --launcher pytorch "$@"
