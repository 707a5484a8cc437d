#!/bin/bash
# guest-install.sh IMAGE BIN: puts our own programs into a guest image (ext4, not in use), as a user
# would: the guest agent by its own `install`, ledger and counter as services. Takes a second; the
# same on the machine that builds images and on a node, so that a changed agent need not bring
# a whole image over again.
set -euo pipefail
image=$1
bin=$2

root=$(mktemp -d)
trap 'if mountpoint -q "$root"; then umount "$root"; fi; rmdir "$root"' EXIT
mount -o loop "$image" "$root"
for name in ledger counter; do
    if [[ -x $bin/understudy-$name ]]; then
        install -m 755 "$bin/understudy-$name" "$root/usr/local/bin/understudy-$name"
        systemctl --quiet --root="$root" enable "$name.service"
    fi
done
if [[ -x $bin/understudy-guest ]]; then
    "$bin/understudy-guest" install --root "$root"
fi
umount "$root"
