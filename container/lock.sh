#!/bin/bash
# Rewrites the lock files from the environment in use, which has passed the tests: the versions of every installation
# (constraints.txt; what a job needs of them also in job/machine/tested.py, for `emotion-job doctor`) and, with hashes, what goes into
# the images (lock-VARIANT.txt) and what builds them (lock-build.txt).
#
# Where torch's CPU build is not on the index that pip uses, PIP_FIND_LINKS names a folder that has it.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
new=$(mktemp -d)
trap 'rm -r "$new"' EXIT

head -2 container/constraints.txt > "$new/constraints.txt"
$bin/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$//' | grep -viE '^(setuptools|pip)=' >> "$new/constraints.txt"

compile() {  # compile VARIANT ARGUMENT...
    $bin/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --constraint "$new/constraints.txt" \
        --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file "$new/lock-$1.txt" "${@:2}"
}
torch=$(sed -n 's/^torch==//p' "$new/constraints.txt")
echo "torch==$torch+cpu" > "$new/cpu.txt"
compile cpu pyproject.toml --extra job --constraint "$new/cpu.txt" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}
# Without the folder that has the CPU build: its version is the higher one, and would be taken.
compile cuda pyproject.toml --extra job
printf 'pip\nsetuptools>=77\n' > "$new/build.in"
compile build "$new/build.in"

$bin/python container/tested.py "$new/constraints.txt" > "$new/tested.py"

mv "$new/constraints.txt" "$new"/lock-{cpu,cuda,build}.txt container/
mv "$new/tested.py" job/machine/
$bin/python -m pytest -q tests/container/test_locks.py
