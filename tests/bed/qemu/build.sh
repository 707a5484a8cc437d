#!/bin/bash
# Builds the QEMU that node VMs run in: Debian's source with the patches beside this script, and only
# what a node has (devices.mak).
#
#   build.sh VERSION DIR    DIR gets qemu-system-x86_64; VERSION is that of Debian's source package
#
# Why not Debian's binary: it loses a guest or the node every few minutes while two guests run. An interrupt that
# KVM injects may be delivered twice, and one CPU may undo what another has just changed in its flags, such as the
# end of nested paging. Each patch tells of its fault.
set -euo pipefail
# shellcheck source=tests/bed/lib.sh
source "$(dirname "$0")/../lib.sh"

VERSION=$1
DIR=$2
HERE=$BED_DIR/qemu

rm -rf "$DIR" && mkdir -p "$DIR/lists" "$DIR/sources"
DIR=$(cd "$DIR" && pwd)
cd "$DIR"

# The machine's own package sources, asked for source packages; lists of our own, so that its are left alone.
: >sources/one.list
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    if [[ -f $file ]]; then sed -n 's/^deb /deb-src /p' "$file" >>sources/one.list; fi
done
for file in /etc/apt/sources.list.d/*.sources; do
    if [[ -f $file ]]; then sed 's/^Types:.*/Types: deb-src/' "$file" >"sources/$(basename "$file")"; fi
done
apt=(apt-get -q -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$DIR/sources"
    -o "Dir::State::lists=$DIR/lists" -o APT::Sandbox::User=root -o Acquire::Retries=3)
# Sources that are not Debian's may have no source packages; what matters is that QEMU is found.
"${apt[@]}" update || say "not every package source has a list of sources"
"${apt[@]}" source "qemu=$VERSION"
mv qemu-*/ source
for patch in "$HERE"/*.patch; do
    patch -d source -p1 <"$patch"
done
cp "$HERE/devices.mak" source/configs/devices/x86_64-softmmu/node.mak

mkdir build
cd build
../source/configure --target-list=x86_64-softmmu --without-default-features --enable-system --enable-tcg --enable-kvm \
    --without-default-devices --with-devices-x86_64=node --audio-drv-list= \
    --disable-werror --disable-debug-info --meson="$(command -v meson)"
ninja -j "$(nproc)" qemu-system-x86_64
cd ..
# Its own firmware path is that of a build directory that is about to go.
mv build/qemu-system-x86_64 .
rm -rf source build lists sources qemu_*
./qemu-system-x86_64 --version
