# shellcheck shell=bash
# What the scripts of the test bed share. Sourced, never run.

BED_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO_DIR="$(cd "$BED_DIR/../.." && pwd)"

# Where build products live: named by the user, else the machine's cache, else the checkout.
cache_dir() {
    if [[ -n "${UNDERSTUDY_CACHE:-}" ]]; then
        echo "$UNDERSTUDY_CACHE"
    elif [[ -d /var/cache/understudy && -w /var/cache/understudy ]]; then
        echo /var/cache/understudy
    else
        echo "$REPO_DIR/target/bed"
    fi
}

say() { printf '%s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$1" >&2
    shift
    local line
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

# step NAME COMMAND...: runs the command with its output kept in a log, prints one line with the
# time it took; the end of the log when it fails.
step() {
    local name=$1 log started status=0
    shift
    log="$LOG_DIR/${name// /-}.log"
    started=$EPOCHREALTIME
    "$@" >"$log" 2>&1 || status=$?
    local seconds
    seconds=$(awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
    if ((status != 0)); then
        say "  $name: failed after $seconds s; the end of $log:"
        tail -n 25 "$log" | sed 's/^/    | /' >&2
        return "$status"
    fi
    say "  $name: $seconds s"
}

# hash_of FILE|DIR...: one hash over names (relative), modes and contents.
hash_of() {
    local path
    for path in "$@"; do
        if [[ -d $path ]]; then
            (cd "$path" && find . \( -type f -o -type l \) -printf '%p %m %l\n' | LC_ALL=C sort \
                && find . -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum)
        else
            stat -c %a "$path" && sha256sum <"$path"
        fi
    done | sha256sum | cut -c1-16
}

require_root() {
    [[ $(id -u) == 0 ]] || die "the test bed needs root (chroots, network namespaces, taps)" \
        "run it as root, for instance: sudo -E make ${1:-setup}"
}
