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

# The Go that builds the bed's programs where the machine's is older than their modules ask for.
GO_VERSION=1.26.8

# go_found: a go command in PATH, or where Go's own installation puts it.
go_found() {
    local go
    for go in "$(command -v go || true)" /usr/local/go/bin/go; do
        if [[ -n $go && -x $go ]]; then echo "$go" && return; fi
    done
    return 1
}

# go_new_enough GO: not older than GO_VERSION's minor version.
go_new_enough() {
    local version
    version=$(cd / && GOTOOLCHAIN=local "$1" env GOVERSION) || return 1
    [[ $(printf '%s\n' "go${GO_VERSION%.*}" "$version" | sort -V | head -n 1) == "go${GO_VERSION%.*}" ]]
}

# go_toolchain CACHE: sets GO to a Go that is new enough. Distributions have older ones, which can build nothing here
# but can fetch a newer one: each release of Go is a Go module as well, checked against the public checksum database.
go_toolchain() {
    local kept=$1/go-$GO_VERSION old
    export GOTOOLCHAIN=local
    GO=$(go_found) || GO=''
    if [[ -n $GO ]] && go_new_enough "$GO"; then return; fi
    old=$GO GO=$kept/bin/go
    if [[ -x $GO ]]; then return; fi
    [[ -n $old ]] || die "go is missing, which the Kubernetes programs of the test bed are built with" \
        "tests/bed/setup.sh installs one; or install Go ${GO_VERSION%.*} or newer yourself"
    step "Go $GO_VERSION" go_fetch "$old" "$kept" \
        || die "Go $GO_VERSION cannot be fetched" \
            "the go here is $(cd / && "$old" env GOVERSION), too old; it fetches the newer one through GOPROXY ($("$old" env GOPROXY))" \
            "or install Go ${GO_VERSION%.*} or newer yourself and put it into PATH"
}

# go_fetch GO DIR: the release as a module, made a Go again: modules have neither executable files nor a go.mod within.
go_fetch() {
    local dir file
    rm -rf "$2.tmp" && mkdir -p "$2.tmp/module"
    dir=$(cd "$2.tmp/module" && GOFLAGS='' "$1" mod download -json "golang.org/toolchain@v0.0.1-go$GO_VERSION.linux-amd64" \
        | tee /dev/stderr | jq -er .Dir)
    cp -r --no-preserve=mode "$dir" "$2.tmp/go"
    find "$2.tmp/go" -name _go.mod | while read -r file; do mv "$file" "${file%_go.mod}go.mod"; done
    chmod -R a+x "$2.tmp/go/bin" "$2.tmp/go/pkg/tool"
    "$2.tmp/go/bin/go" version
    mv "$2.tmp/go" "$2"
    rm -rf "$2.tmp"
}
