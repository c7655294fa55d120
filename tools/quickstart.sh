#!/usr/bin/env bash
# Sets everything up, then shows Pro-tuning at work on images it draws. Arguments go on to
# tools/quickstart.py.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
prepare_environment

exec "$ENV_PYTHON" "$ROOT/tools/quickstart.py" "$@"
