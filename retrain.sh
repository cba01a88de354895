#!/bin/sh
# Train on the folders of pictures in data/:   ./retrain.sh [flags of retrain.py]
#
# Makes the environment .venv with what requirements.txt names, then runs retrain.py with the flags below and yours.
# Flags of yours come last, so they win. Paths are relative to this folder.
set -eu
CDPATH="" cd -- "$(dirname -- "$0")"

fail() {
    echo "retrain.sh: error: $1" >&2
    exit 1
}

# TensorFlow exists for these versions of Python.
supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'

find_python() {
    for python in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$python" -c "$supported" >/dev/null 2>&1; then
            return
        fi
    done
    if found=$(python3 --version 2>/dev/null); then
        fail "$found is too old or too new for TensorFlow, which needs Python 3.10 to 3.13; install one of these."
    fi
    fail "there is no python3; install Python 3.10 to 3.13 (https://www.python.org/downloads/ or your system's packages)."
}

if ! .venv/bin/python -c "$supported" >/dev/null 2>&1 || ! cmp -s requirements.txt .venv/installed.txt; then
    find_python
    [ -w . ] || fail "the folder $(pwd) is read-only; copy it to a place of your own and run it there."
    [ ! -e .venv ] || [ -O .venv ] || fail "$(pwd)/.venv is another user's; copy the folder without it and run it there."
    echo "Installing what requirements.txt names into .venv; the first time, this takes some minutes."
    .venv/bin/python -c "$supported" >/dev/null 2>&1 || rm -rf .venv
    "$python" -m venv .venv ||
        fail "Python's venv module does not work; on Debian and Ubuntu, install the package python3-venv."
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt ||
        fail "the packages could not be installed (see above); the next run tries again."
    cp requirements.txt .venv/installed.txt
    echo "Installed."
fi

exec .venv/bin/python retrain.py --bottleneck_dir bottleneck --how_many_training_steps 200 \
    --model_dir inception_model --output_graph output_graph.pb --output_labels output_labels.txt "$@"
