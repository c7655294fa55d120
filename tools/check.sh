#!/usr/bin/env bash
# A quick look before a commit: lint, and the tests of the files that differ from a revision (HEAD
# unless another is named), by their names. tools/run_tests.sh runs everything.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
prepare_environment pytest hypothesis

cd "$ROOT"
"$ENV_PYTHON" -m ruff check .
changed=$( (git diff --name-only --diff-filter=d "${1:-HEAD}"; git ls-files --others --exclude-standard) \
    | grep '\.py$' | sort -u || true)
tests=()
while read -r file; do
    [[ -n $file ]] || continue
    name=$(basename "$file" .py)
    if [[ $name == test_* ]]; then
        tests+=("$file")
        continue
    fi
    while read -r found; do tests+=("$found"); done < <(find tests -name "test_$name.py")
done <<<"$changed"
if ((${#tests[@]} == 0)); then
    echo 'no test file belongs to what changed'
    exit 0
fi
mapfile -t tests < <(printf '%s\n' "${tests[@]}" | sort -u)
exec "$ENV_PYTHON" -m pytest -q -x "${tests[@]}"
