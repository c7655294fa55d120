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
exec bash "$(dirname "${BASH_SOURCE[0]}")/srun.sh" test.py "$partition" "$job_name" "$config" "$checkpoint" --launcher slurm "$@"
