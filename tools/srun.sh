#!/usr/bin/env bash
# What slurm_train.sh and slurm_test.sh share: starts a tool, with its arguments, through srun.
set -euo pipefail

tool=$1
partition=$2
job_name=$3
shift 3

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
per_node=()
if [[ $gpus_per_node != 0 ]]; then
    # A job smaller than one node must not ask for more tasks a node than it has.
    if ((gpus < gpus_per_node)); then
        gpus_per_node=$gpus
    fi
    per_node=(--gres="gpu:$gpus_per_node" --ntasks-per-node="$gpus_per_node")
fi
read -r -a srun_args <<<"${SRUN_ARGS:-}"

PYTHONPATH="$(dirname "$tools")${PYTHONPATH:+:$PYTHONPATH}" exec srun \
    --partition="$partition" \
    --job-name="$job_name" \
    --ntasks="$gpus" \
    ${per_node[@]+"${per_node[@]}"} \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    "${PYTHON:-python}" -u "$tools/$tool" "$@"
