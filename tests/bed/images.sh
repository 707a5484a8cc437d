#!/bin/bash
# Builds the images of the test bed and says where they are: a stock Debian 12 guest and a node, both
# on the older of two kernels, with the newer one's package at hand, and the QEMU that nodes run in.
# What has not changed is not built again; a kill leaves no half image, since everything gets its name
# last.
#
#   images.sh [--bin DIR] [--out FILE] [qemu|node|guest-base|guest ...]     (default: all)
#
#   --bin DIR    where understudy-guest, understudy-ledger and understudy-counter (static) are; what is
#                not there the guest image lacks
#   --out FILE   JSON with the paths of what was built
set -euo pipefail
# shellcheck source=tests/bed/lib.sh
source "$(dirname "$0")/lib.sh"

BIN=''
OUT=''
WANTED=()
while (($#)); do
    case $1 in
    --bin) BIN=$2 && shift 2 ;;
    --out) OUT=$2 && shift 2 ;;
    qemu | node | guest-base | guest) WANTED+=("$1") && shift ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) die "images.sh: unknown argument '$1'" "known are --bin DIR, --out FILE, qemu, node, guest-base, guest" ;;
    esac
done
((${#WANTED[@]})) || WANTED=(qemu node guest-base guest)
require_root images

CACHE=$(cache_dir)
mkdir -p "$CACHE" "$CACHE/debs" "$CACHE/ssh" "$CACHE/logs"
CACHE=$(cd "$CACHE" && pwd)
LOG_DIR=$CACHE/logs
SUITE=bookworm

# One build at a time; whoever waits finds the images made.
exec 9>"$CACHE/images.lock"
flock -n 9 || { say "images: waiting for another build in $CACHE" && flock 9; }

if [[ ! -f $CACHE/ssh/id_ed25519 ]]; then
    rm -f "$CACHE"/ssh/id_ed25519.new*
    ssh-keygen -q -t ed25519 -N '' -C understudy-bed -f "$CACHE/ssh/id_ed25519.new"
    mv "$CACHE/ssh/id_ed25519.new.pub" "$CACHE/ssh/id_ed25519.pub"
    mv "$CACHE/ssh/id_ed25519.new" "$CACHE/ssh/id_ed25519"
fi

# --- what goes in ------------------------------------------------------------------------------

COMMON=systemd-sysv,systemd,udev,dbus,kmod,iproute2,iputils-ping,openssh-server,ca-certificates
COMMON+=,e2fsprogs,zstd,initramfs-tools,procps,less,libpam-systemd,attr,acl,util-linux
GUEST_PACKAGES=$COMMON,nginx-light,cron,logrotate,fdisk,curl,apt-utils
NODE_PACKAGES=$COMMON,jq,curl,socat,strace,tcpdump,psmisc,lsof,ethtool,mount

# The two newest kernels of the distribution's cloud flavour: guest and node run the older one and have
# the newer one's package at hand, as any server after an upgrade.
find_kernels() {
    apt-cache pkgnames linux-image-6.1.0- | grep -E '^linux-image-6\.1\.0-[0-9]+-cloud-amd64$' | sort -V | tail -n 2
}

# What the package lists of this machine offer: kernels and versions. Versions are part of a key,
# so that an update rebuilds. apt takes seconds to answer, so its answer is kept as long as its
# lists are the same.
offered() {
    local kernels memo
    memo=$CACHE/offered-$({
        echo "$GUEST_PACKAGES,$NODE_PACKAGES,qemu-system-x86"
        stat -c '%n %Y %s' /var/lib/apt/lists/* /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true
    } | sha256sum | cut -c1-16)
    if [[ ! -f $memo ]]; then
        mapfile -t kernels < <(find_kernels)
        if ((${#kernels[@]} < 2)); then return; fi
        rm -f "$CACHE"/offered-*
        {
            printf '%s\n' "${kernels[@]}"
            # shellcheck disable=SC2046
            apt-cache show --no-all-versions "${kernels[@]}" qemu-system-x86 $(echo "$GUEST_PACKAGES,$NODE_PACKAGES" | tr , ' ') \
                | grep -E '^(Package|Version):' | paste - -
        } >"$memo.tmp"
        mv "$memo.tmp" "$memo"
    fi
    cat "$memo"
}
OFFERED=$(offered)
if [[ -z $OFFERED ]]; then
    step "apt-get update" apt-get -q update
    OFFERED=$(offered)
fi
[[ -n $OFFERED ]] || die "there are no two packages linux-image-6.1.0-NN-cloud-amd64 to choose from" \
    "the package sources of this machine must be those of Debian 12 ($SUITE, $SUITE-updates, $SUITE-security)"
OLDER=$(sed -n 1p <<<"$OFFERED") NEWER=$(sed -n 2p <<<"$OFFERED")
# Of the source package: a rebuild (+bN) has none of its own.
QEMU_VERSION=$(awk '$2 == "qemu-system-x86" { sub(/\+b[0-9]+$/, "", $4); print $4; exit }' <<<"$OFFERED")

# --- how it is made ----------------------------------------------------------------------------

# rootfs DIR PACKAGES: a Debian root directory, its packages from and into the shared cache.
rootfs() {
    local dir=$1 packages=$2
    mmdebstrap --mode=root --variant=minbase --format=directory --include="$packages" \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
        --dpkgopt=force-unsafe-io --skip=download/empty --skip=essential/unlink \
        --setup-hook="mkdir -p \"\$1/var/cache/apt/archives\" && find '$CACHE/debs' -name '*.deb' -exec cp -t \"\$1/var/cache/apt/archives\" {} +" \
        --customize-hook="cd \"\$1/var/cache/apt/archives\" && for d in *.deb; do [ -e '$CACHE/debs/'\$d ] || { cp \$d '$CACHE/debs/'.\$d.\$\$ && mv '$CACHE/debs/'.\$d.\$\$ '$CACHE/debs/'\$d; }; done" \
        "$SUITE" "$dir"
    # What mmdebstrap leaves for a first boot to fill: known from the start, so that nobody waits.
    uuidgen -r | tr -d - >"$dir/etc/machine-id"
    rm -f "$dir/etc/resolv.conf" && : >"$dir/etc/resolv.conf"
}

# tree NAME ROOT: our files over the stock ones, owned by root; those that all have, and those of NAME.
tree() {
    local name
    for name in common "$1"; do
        tar -C "$BED_DIR/$name" --owner=0 --group=0 -c . | tar -C "$2" --no-overwrite-dir -x
    done
}

# The newer kernel's package, of the version that is offered now.
newer_package() {
    find "$CACHE/debs" -name "${NEWER}_*.deb" | sort -V | tail -n 1
}

fetch_newer() { (cd "$CACHE/debs" && apt-get -q -o APT::Sandbox::User=root download "$NEWER"); }

# at_hand ROOT: the newer kernel's package, to be installed.
at_hand() {
    mkdir -p "$1/var/cache/apt/archives"
    cp "$(newer_package)" "$1/var/cache/apt/archives/"
}

# image ROOT FILE SIZE UUID LABEL
image() {
    rm -f "$2"
    mke2fs -q -t ext4 -d "$1" -U "$4" -L "$5" -E lazy_itable_init=1,root_owner=0:0 -m 1 "$2" "$3"
}

boot_files() { # ROOT DIR
    cp "$1"/boot/vmlinuz-* "$2/vmlinuz"
    cp "$1"/boot/initrd.img-* "$2/initrd.img"
}

fstab() { # ROOT UUID
    printf 'UUID=%s / ext4 defaults,errors=remount-ro 0 1\n' "$2" >"$1/etc/fstab"
}

authorize() { # ROOT
    install -d -m 700 "$1/root/.ssh"
    install -m 600 "$CACHE/ssh/id_ed25519.pub" "$1/root/.ssh/authorized_keys"
}

build_node() {
    local tmp=$NODE.tmp uuid
    rm -rf "$tmp" && mkdir -p "$tmp"
    rootfs "$tmp/rootfs" "$NODE_PACKAGES,$OLDER"
    uuid=$(uuidgen -r)
    tree node "$tmp/rootfs"
    fstab "$tmp/rootfs" "$uuid"
    mkdir -p "$tmp/rootfs/var/lib/understudy"
    # Not nofail: whoever can log in shall find it mounted.
    printf 'LABEL=understudy /var/lib/understudy ext4 defaults,noatime 0 2\n' \
        >>"$tmp/rootfs/etc/fstab"
    authorize "$tmp/rootfs"
    chroot "$tmp/rootfs" systemctl -q enable systemd-networkd systemd-network-generator
    chroot "$tmp/rootfs" systemctl -q mask systemd-networkd-wait-online apt-daily.timer \
        apt-daily-upgrade.timer e2scrub_reap e2scrub_all.timer dpkg-db-backup.timer
    at_hand "$tmp/rootfs"
    # Its kernel stays on its disk: a node boots what it finds there.
    image "$tmp/rootfs" "$tmp/root.ext4" 4G "$uuid" node
    rm -rf "$tmp/rootfs"
    jq -n --arg kernel "${OLDER#linux-image-}" --arg uuid "$uuid" \
        '{kernel: $kernel, uuid: $uuid}' >"$tmp/meta.json"
    mv "$tmp" "$NODE"
}

build_base() {
    local tmp=$BASE.tmp uuid
    rm -rf "$tmp" && mkdir -p "$tmp"
    rootfs "$tmp/rootfs" "$GUEST_PACKAGES,$OLDER"
    uuid=$(uuidgen -r)
    tree guest "$tmp/rootfs"
    fstab "$tmp/rootfs" "$uuid"
    authorize "$tmp/rootfs"
    echo guest >"$tmp/rootfs/etc/hostname"
    printf '127.0.0.1\tlocalhost\n127.0.1.1\tguest\n' >"$tmp/rootfs/etc/hosts"
    chroot "$tmp/rootfs" systemctl -q enable systemd-networkd nginx ssh serial-getty@ttyS0
    # Scrubbing LVM snapshots: 10 s of an emulated boot, for nothing.
    chroot "$tmp/rootfs" systemctl -q disable systemd-networkd-wait-online e2scrub_reap e2scrub_all.timer
    rm -f "$tmp/rootfs/var/www/html/index.nginx-debian.html"
    at_hand "$tmp/rootfs"
    boot_files "$tmp/rootfs" "$tmp"
    image "$tmp/rootfs" "$tmp/guest.ext4" 2560M "$uuid" root
    rm -rf "$tmp/rootfs"
    jq -n --arg uuid "$uuid" --arg older "${OLDER#linux-image-}" --arg newer "${NEWER#linux-image-}" \
        '{uuid: $uuid, olderKernel: $older, newerKernel: $newer}' >"$tmp/meta.json"
    mv "$tmp" "$BASE"
}

build_qemu() {
    "$BED_DIR/qemu/build.sh" "$QEMU_VERSION" "$QEMU.tmp"
    mv "$QEMU.tmp" "$QEMU"
}

# The cheap step, repeated whenever agent or ledger change.
build_guest() {
    local tmp=$GUEST.tmp
    rm -rf "$tmp" && mkdir -p "$tmp"
    cp --sparse=always --reflink=auto "$BASE/guest.ext4" "$tmp/guest.ext4"
    ln "$BASE/vmlinuz" "$BASE/initrd.img" "$tmp/"
    "$BED_DIR/guest-install.sh" "$tmp/guest.ext4" "${BIN:-/nonexistent}"
    jq '. + {binaries: $ARGS.positional}' "$BASE/meta.json" --args "${GUEST_BINARIES[@]}" >"$tmp/meta.json"
    mv "$tmp" "$GUEST"
}

# key_of PACKAGES PATH...: over the packages' versions, our files and the recipe.
key_of() {
    local packages=$1
    shift
    {
        echo "$packages" "$SUITE"
        # Version lines of these packages alone.
        awk 'NR == FNR { want[$0]; next } $2 in want' <(tr , '\n' <<<"$packages") <(tail -n +3 <<<"$OFFERED")
        hash_of "$@"
        declare -f rootfs tree image boot_files fstab authorize newer_package at_hand build_node build_base
    } | sha256sum | cut -c1-12
}
NODE_KEY=$(key_of "$NODE_PACKAGES,$OLDER,$NEWER" "$BED_DIR/common" "$BED_DIR/node" "$CACHE/ssh/id_ed25519.pub")
BASE_KEY=$(key_of "$GUEST_PACKAGES,$OLDER,$NEWER" "$BED_DIR/common" "$BED_DIR/guest" "$CACHE/ssh/id_ed25519.pub")
QEMU_KEY=$({ echo "$QEMU_VERSION" && hash_of "$BED_DIR/qemu"; } | sha256sum | cut -c1-12)
GUEST_INPUTS=("$BED_DIR/guest-install.sh")
GUEST_BINARIES=()
for name in understudy-guest understudy-ledger understudy-counter; do
    if [[ -n $BIN && -x $BIN/$name ]]; then
        GUEST_INPUTS+=("$BIN/$name")
        GUEST_BINARIES+=("$name")
    fi
done
GUEST_KEY=$({ echo "$BASE_KEY" && hash_of "${GUEST_INPUTS[@]}" && declare -f build_guest; } | sha256sum | cut -c1-12)

QEMU=$CACHE/qemu-$QEMU_KEY NODE=$CACHE/node-$NODE_KEY BASE=$CACHE/guest-base-$BASE_KEY GUEST=$CACHE/guest-$GUEST_KEY

wanted() { [[ " ${WANTED[*]} " == *" $1 "* ]]; }

# They have nothing to do with each other, and images wait for downloads and disks.
pids=()
if wanted qemu && [[ ! -d $QEMU ]]; then
    say "  QEMU: from Debian's source, with our patches; once, some minutes"
    step QEMU build_qemu &
    pids+=($!)
fi
if { wanted node && [[ ! -d $NODE ]]; } || { { wanted guest-base || wanted guest; } && [[ ! -d $BASE ]]; }; then
    step "newer kernel" fetch_newer
fi
if wanted node && [[ ! -d $NODE ]]; then
    step "node image" build_node &
    pids+=($!)
fi
if { wanted guest-base || wanted guest; } && [[ ! -d $BASE ]]; then
    step "guest base" build_base &
    pids+=($!)
fi
for pid in "${pids[@]}"; do wait "$pid"; done
if wanted guest; then
    for name in understudy-guest understudy-ledger understudy-counter; do
        [[ " ${GUEST_BINARIES[*]} " == *" $name "* ]] \
            || say "  guest image: without $name (not found in '${BIN:-no --bin DIR given}')"
    done
    if [[ ! -d $GUEST ]]; then step "guest image" build_guest; fi
fi

# Use is noted, so that the oldest go first; what an instance still has open lives until it closes.
prune() { # NAME KEEP
    find "$CACHE" -maxdepth 1 -type d -name "$1-????????????" -printf '%T@ %p\n' | sort -rn \
        | tail -n +"$(($2 + 1))" | cut -d ' ' -f 2- | xargs -r rm -rf
}
for dir in "$QEMU" "$NODE" "$BASE" "$GUEST"; do if [[ -d $dir ]]; then touch "$dir"; fi; done
prune qemu 2
prune node 3
prune guest-base 3
prune guest 8

if [[ -n $OUT ]]; then
    mkdir -p "$(dirname "$OUT")"
    package=/var/cache/apt/archives/$(basename "$(newer_package)")
    jq -n --arg cache "$CACHE" --arg qemu "$QEMU/qemu-system-x86_64" --arg node "$NODE" --arg base "$BASE" --arg guest "$GUEST" \
        --arg older "${OLDER#linux-image-}" --arg newer "${NEWER#linux-image-}" --arg package "$package" \
        '{cache: $cache, qemu: $qemu, node: $node, guestBase: $base, guest: $guest,
          olderKernel: $older, newerKernel: $newer, newerPackage: $package}' >"$OUT.tmp"
    mv "$OUT.tmp" "$OUT"
fi
