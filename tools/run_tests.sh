#!/usr/bin/env bash
# Sets everything up, then runs the tests, by as many processes as there are cores, four at most.
# Arguments go on to pytest: bash tools/run_tests.sh -k swin; -n 0 is one process.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
prepare_environment pytest hypothesis

cd "$ROOT"
parallel=()
cores=$("$ENV_PYTHON" -c 'import os, xdist; print(min(4, os.cpu_count()))' 2>/dev/null) || true
if [[ -n $cores ]]; then # pytest-xdist is there
    # A file's tests share what is costly to make; cores are for processes, not for threads.
    parallel=(-n "$cores" --dist loadfile)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
exec "$ENV_PYTHON" -m pytest ${parallel[@]+"${parallel[@]}"} "$@"
