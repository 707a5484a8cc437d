#!/bin/bash
# Installs what the test bed and the build need on a Debian 12 machine. Does nothing, in
# milliseconds, where everything is there.
set -euo pipefail
# shellcheck source=tests/bed/lib.sh
source "$(dirname "$0")/lib.sh"

# command (or file) : package that brings it
NEEDED="
ninja:ninja-build
meson:meson
pkg-config:pkg-config
patch:patch
dpkg-source:dpkg-dev
/usr/include/glib-2.0/glib.h:libglib2.0-dev
/usr/include/pixman-1/pixman.h:libpixman-1-dev
/usr/include/libfdt.h:libfdt-dev
/usr/share/seabios/bios-256k.bin:seabios
/usr/share/qemu/kvmvapic.bin:qemu-system-data
/usr/lib/ipxe/qemu/efi-virtio.rom:ipxe-qemu
mmdebstrap:mmdebstrap
mke2fs:e2fsprogs
dnsmasq:dnsmasq-base
ssh:openssh-client
ip:iproute2
jq:jq
curl:curl
cc:gcc
make:make
git:git
zstd:zstd
shellcheck:shellcheck
strip:binutils
uuidgen:uuid-runtime
/usr/include/seccomp.h:libseccomp-dev
/usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
/usr/lib/x86_64-linux-gnu/libc.a:libc6-dev
/etc/ssl/certs/ca-certificates.crt:ca-certificates
"

missing=()
for entry in $NEEDED; do
    what=${entry%%:*}
    if [[ $what == /* ]]; then
        [[ -e $what ]] || missing+=("${entry##*:}")
    else
        PATH="$PATH:/usr/sbin:/sbin" command -v "$what" >/dev/null || missing+=("${entry##*:}")
    fi
done
# Any: one that is too old can fetch the one that is needed (lib.sh).
go_found >/dev/null || missing+=(golang-go)

if ((${#missing[@]})); then
    [[ $(id -u) == 0 ]] || die "packages are missing: ${missing[*]}" \
        "install them as root: apt-get install --no-install-recommends ${missing[*]}"
    command -v apt-get >/dev/null || die "packages are missing: ${missing[*]}" \
        "this machine has no apt-get; the test bed is made for Debian 12"
    LOG_DIR=$(mktemp -d)
    say "setup: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    step "apt-get update" apt-get -q update
    step "apt-get install" apt-get -q install -y --no-install-recommends "${missing[@]}"
fi

if ! command -v cargo >/dev/null; then
    [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/cargo ]] \
        || die "cargo is missing: the build needs Rust $(sed -n 's/^channel = "\(.*\)"/\1/p' "$REPO_DIR/rust-toolchain.toml")" \
            "install rustup (https://rustup.rs), then run this again; rust-toolchain.toml selects the version"
fi
