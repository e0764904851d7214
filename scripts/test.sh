#!/usr/bin/env bash
# bash scripts/test.sh [ARGUMENT of pytest]...
# All checks, as the continuous integration runs them: lint, format, types, tests. Installs into .venv on the first run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test

cd "$root"
check() {
    say "== $*"
    "$venv/bin/python" -m "$@"
}
check ruff check --quiet .
check ruff format --quiet --check .
check mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check pytest -q -n 2 --dist loadfile "$@"
