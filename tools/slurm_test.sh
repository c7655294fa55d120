#!/usr/bin/env bash
# Evaluates a checkpoint on a Slurm cluster.
set -euo pipefail

usage() {
    cat >&2 <<TEXT
usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS='…'] \\
       $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
  GPUS is the number of processes of the whole job; GPUS_PER_NODE=0 runs all of them on CPUs.
  PYTHON names another interpreter than python.
  MASTER_PORT (29500 unless set) must differ between jobs that share a node.
TEXT
    exit 2
}

[[ $# -ge 4 ]] || usage
partition=$1
job_name=$2
config=$3
checkpoint=$4
shift 4

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
    "${PYTHON:-python}" -u "$tools/test.py" "$config" "$checkpoint" --launcher slurm "$@"
