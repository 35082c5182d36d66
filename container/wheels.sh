#!/bin/bash
# wheels.sh VARIANT: lay the wheels of lock-VARIANT.txt and lock-build.txt into container/wheels, and nothing else, each held against its
# hash. They come from where this machine's pip is told to look.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf wheels
mkdir wheels
platforms=()
for tag in linux manylinux_2_5 manylinux_2_12 manylinux_2_17 manylinux_2_24 manylinux_2_26 manylinux_2_27 manylinux_2_28; do
    platforms+=(--platform "${tag}_x86_64")
done
../.venv/bin/python -m pip download --quiet --dest wheels --no-deps --only-binary :all: --require-hashes \
    --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none "${platforms[@]}" \
    --requirement "lock-$1.txt" --requirement lock-build.txt
touch "wheels/.$1"
