#!/usr/bin/env bash
# Makes the site of docs/ with warnings as errors, or serves it and makes it anew at every change:
#
#   bash tools/docs.sh [build|serve]     work_dirs/site/index.html, or http://127.0.0.1:8000
#
# It takes MkDocs and what belongs to it (requirements/docs.txt), in the environment of
# tools/install.sh; the package itself is read, not imported.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
verb=${1:-build}
[[ $# -le 1 && $verb =~ ^(build|serve)$ ]] || die "unexpected '$*': expected build or serve"
prepare_environment

cd "$ROOT"
if ! "$ENV_PYTHON" -c 'import material, mkdocstrings_handlers.python' 2>/dev/null; then
    [[ ${MMPROTUNE_ENV:-venv} == venv ]] ||
        die "MMPROTUNE_ENV=current, but $ENV_PYTHON lacks MkDocs: pip install -r requirements/docs.txt"
    say 'installing what the site takes (30 MB)'
    pip_run install -r requirements/docs.txt
fi
export NO_MKDOCS_2_WARNING=1 # of the theme, about versions that are not pinned here
exec "$ENV_PYTHON" -m mkdocs "$verb" --strict
