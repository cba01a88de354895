#!/bin/sh
# Lint, type-check and test everything, in an environment of its own:   sh tests/run.sh [flags of pytest]
set -eu
cd "$(dirname "$0")/.."

# As a new user would; it also finds the Python to use.
./retrain.sh --help >/dev/null

if ! .venv-tests/bin/python -c "" >/dev/null 2>&1 || ! cmp -s tests/requirements.lock .venv-tests/installed.txt; then
    .venv/bin/python -m venv --clear .venv-tests
    .venv-tests/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r tests/requirements.lock
    cp tests/requirements.lock .venv-tests/installed.txt
fi

.venv-tests/bin/ruff check .
.venv-tests/bin/ruff format --check .
.venv-tests/bin/mypy
.venv-tests/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"  # many wait half their time
