#!/bin/bash
# wheels.sh VARIANT: lay the wheels of lock-VARIANT.txt and lock-build.txt into container/wheels, and nothing else, each held against its
# hash. They come from the package index that this machine's pip is configured to use.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf wheels
mkdir wheels
# All that Debian 12, glibc 2.36, can load.
platforms=()
for tag in linux manylinux{1,2010,2014} manylinux_2_{5..36}; do platforms+=(--platform "${tag}_x86_64"); done
../.venv/bin/python -m pip download --quiet --dest wheels --no-deps --only-binary :all: --require-hashes \
    --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none "${platforms[@]}" \
    --requirement "lock-$1.txt" --requirement lock-build.txt
touch "wheels/.$1"
