#!/usr/bin/env bash
# Sets everything up, then runs the tests. Arguments go on to pytest: bash tools/run_tests.sh -k swin
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
prepare_environment pytest hypothesis

cd "$ROOT"
exec "$ENV_PYTHON" -m pytest "$@"
