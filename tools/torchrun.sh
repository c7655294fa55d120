#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share: starts a tool, with its arguments, through torchrun.
set -euo pipefail

tool=$1
gpus=$2
shift 2

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ${NNODES:-1} == 1 ]]; then
    # Port 0 is any free one, so that two jobs on one machine do not meet.
    meeting=(--rdzv_backend=c10d --rdzv_endpoint="127.0.0.1:${PORT:-0}" --local_addr=127.0.0.1)
else
    meeting=(--node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}"
             --master_port="${PORT:-29500}")
fi

PYTHONPATH="$(dirname "$tools")${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" "${meeting[@]}" --nproc_per_node="$gpus" "$tools/$tool" "$@"
