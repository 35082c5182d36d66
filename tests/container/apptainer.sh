#!/bin/bash
# apptainer.sh PREFIX: put an Apptainer from Debian sid, the only suite that has one, below PREFIX, for root. Nothing of the system
# is upgraded: it gets sid's libc beside it. Exit code 3 where sid cannot be had three times, or has moved away from this recipe.
set -euo pipefail
prefix=${1:?usage: apptainer.sh PREFIX}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gone() { echo "apptainer.sh: $*" >&2; exit 3; }

# apt with a root of its own, which knows no package that is installed here.
apt=$work/apt
mkdir -p "$apt"/etc/apt/{apt.conf.d,preferences.d,sources.list.d} "$apt"/var/lib/apt/lists/partial "$apt"/var/cache/apt/archives/partial \
    "$apt"/var/lib/dpkg
: > "$apt/var/lib/dpkg/status"
mirror=$({ cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true; } |
    sed -nE 's/^(URIs:|deb( \[.*\])?) *([a-z]+:[^ ]*).*/\3/p' | sed -n 1p)
[ -n "$mirror" ] || gone "no Debian mirror is configured"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > "$apt/etc/apt/sources.list"
cat > "$work/apt.conf" <<C
Dir "$apt";
Dir::State::status "$apt/var/lib/dpkg/status";
APT::Architecture "amd64";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
// A mirror may lag behind by weeks; what it has is signed all the same.
Acquire::Check-Valid-Until "false";
C
export APT_CONFIG=$work/apt.conf
apt-get update -qq --error-on=any || gone "the mirror does not give sid"
(cd "$work" && apt-get download -qq apptainer libc6 libseccomp2 libsqlite3-0) || gone "sid does not have the packages"
unset APT_CONFIG
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/x"; done

from=$work/x/usr/lib/x86_64-linux-gnu
mkdir -p "$prefix/lib" "$prefix/usr/lib/x86_64-linux-gnu"
cp -a "$from"/{ld-linux-x86-64.so.2,libc.so.6,libm.so.6,libpthread.so.0,libdl.so.2,libresolv.so.2,librt.so.1,libnss_*.so*} "$prefix/lib/" ||
    gone "sid's libc is laid out in another way"
cp -L "$from"/{libseccomp.so.2,libsqlite3.so.0} "$prefix/lib/"
cp -a "$work/x/usr/bin" "$prefix/usr/"
cp -a "$from/apptainer" "$prefix/usr/lib/x86_64-linux-gnu/"
cp -a "$work/x/etc" "$prefix/usr/etc"
for program in "$prefix/usr/bin/apptainer" "$prefix/usr/lib/x86_64-linux-gnu/apptainer/bin/starter"; do
    patchelf --set-interpreter "$prefix/lib/ld-linux-x86-64.so.2" "$program"
    patchelf --force-rpath --set-rpath "$prefix/lib" "$program"
done
for library in "$prefix"/lib/{libseccomp.so.2,libsqlite3.so.0}; do patchelf --force-rpath --set-rpath "$prefix/lib" "$library"; done
# It works out where it has been moved to in two ways; both have to find the same.
ln -sfn ../etc "$prefix/usr/lib/etc"
mkdir -p "$prefix"/usr/{,lib/}var/lib/apptainer/mnt/session
chmod -R a+rX "$prefix"
# As distributions have it: without it an ordinary user cannot mount an image.
if [ -c /dev/fuse ]; then chmod 0666 /dev/fuse; fi
"$prefix/usr/bin/apptainer" --version || gone "the program does not start"
