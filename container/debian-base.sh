#!/bin/bash
# A base image for where no registry can be reached: Debian 12 with Python and nothing else, from Debian's packages, as a tar.
#
#     container/debian-base.sh base.tar && docker import --change 'ENV PATH=/usr/bin:/bin' base.tar emotion-base
#     make image BASE=emotion-base
#
# Needs root and mmdebstrap; takes the packages from the mirror that this machine's own apt uses. Security updates are in it.
set -euo pipefail
out=${1:?usage: container/debian-base.sh base.tar}
sources=/etc/apt/sources.list.d/debian.sources
[ -e "$sources" ] || sources=/etc/apt/sources.list
SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --format=tar --variant=minbase --include=python3,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    bookworm "$out.part" "$sources"
mv "$out.part" "$out"
