#!/bin/bash
# Installs what the test bed and the build need on a Debian 12 machine. Does nothing, in
# milliseconds, where everything is there.
set -euo pipefail
# shellcheck source=tests/bed/lib.sh
source "$(dirname "$0")/lib.sh"

# command (or file) : package that brings it
NEEDED="
qemu-system-x86_64:qemu-system-x86
qemu-img:qemu-utils
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

# Debian 12's own QEMU (7.2) loses a guest now and then when two run under the SVM that it emulates; the
# one in Debian's backports does not, and is faster. The machine's own sources stay as they are.
qemu_major() { qemu-system-x86_64 --version | sed -nE '1s/^.*version ([0-9]+)\..*$/\1/p'; }
suite() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }
newer_qemu() {
    local site only=(-o Dir::Etc::sourceparts=/dev/null -o APT::Get::List-Cleanup=0)
    # shellcheck disable=SC2016 # apt-get expands these
    site=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Identifier: Packages' \
        | awk -v suite="$(suite)" '$2 == suite { print $1; exit }')
    [[ -n $site ]] || return 1
    echo "deb $site $(suite)-backports main" >"$LOG_DIR/backports.list"
    only+=(-o "Dir::Etc::sourcelist=$LOG_DIR/backports.list")
    step "apt-get update (backports)" apt-get -q "${only[@]}" update || return 1
    step "apt-get install (QEMU)" apt-get -q "${only[@]}" install -y --no-install-recommends \
        -t "$(suite)-backports" qemu-system-x86 qemu-utils
}
if (($(qemu_major) < 8)) && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    LOG_DIR=${LOG_DIR:-$(mktemp -d)}
    say "setup: a newer QEMU than $(qemu_major) from backports"
    newer_qemu || say "setup: no newer QEMU; a node VM may lose a guest now and then, and tests say so"
fi

if ! command -v cargo >/dev/null; then
    [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/cargo ]] \
        || die "cargo is missing: the build needs Rust $(sed -n 's/^channel = "\(.*\)"/\1/p' "$REPO_DIR/rust-toolchain.toml")" \
            "install rustup (https://rustup.rs), then run this again; rust-toolchain.toml selects the version"
fi
