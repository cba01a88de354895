#!/bin/sh
# Train on the folders of images in data/:   ./retrain.sh [flags of retrain.py]
#
# Makes the environment .venv with what requirements.txt names, then runs retrain.py. It trains 200 steps unless a flag
# says otherwise; what is written lies beside this script, unless a flag names another place.
set -eu
here=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)
own="$here/.venv"

fail() {
    echo "retrain.sh: error: $1" >&2
    exit 1
}

# TensorFlow exists for these versions of Python.
supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
room='import shutil, sys; sys.exit(shutil.disk_usage(sys.argv[1]).free < 4e9)'

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

# An environment without pip is one whose making was interrupted.
works() {
    "$own/bin/python" -c "import pip; $supported" >/dev/null 2>&1
}

if ! works || ! cmp -s "$here/requirements.txt" "$own/installed.txt"; then
    find_python
    [ -w "$here" ] || fail "the folder $here is read-only; copy it to a place of your own and run it there."
    [ ! -e "$own" ] || [ -O "$own" ] || fail "$own is another user's; copy the folder without it and run it there."
    works || "$python" -c "$room" "$here" ||
        fail "the disk of $here has less than 4 GB left, which the packages need; free some."
    echo "Installing what requirements.txt names into .venv; the first time, this takes some minutes."
    works || rm -rf "$own"
    "$python" -m venv "$own" ||
        fail "Python's venv module does not work; on Debian and Ubuntu, install the package python3-venv."
    "$own/bin/python" -m pip install --disable-pip-version-check -r "$here/requirements.txt" ||
        fail "the packages could not be installed (see above); the next run tries again."
    cp "$here/requirements.txt" "$own/installed.txt"
    echo "Installed."
fi

exec "$own/bin/python" "$here/retrain.py" --how_many_training_steps 200 "$@"
