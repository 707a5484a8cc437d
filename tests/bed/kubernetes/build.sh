#!/bin/bash
# Builds the programs of a Kubernetes cluster from Go modules: each folder beside this script pins one upstream by
# its go.mod and go.sum. What has not changed is not built again; a program gets its name last, so that a kill leaves
# no half one.
#
#   build.sh [--out FILE] [PROGRAM|GROUP ...]     (default: control-plane)
#
#   PROGRAM      etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl, kubelet, helm, containerd,
#                containerd-shim-runc-v2, ctr, runc, bridge, host-local, loopback, portmap
#   GROUP        control-plane: what a control plane and its user need; node: what joins a node to it; all
#   --out FILE   JSON with the path of each program asked for
set -euo pipefail
# shellcheck source=tests/bed/lib.sh
source "$(dirname "$0")/../lib.sh"
HERE=$BED_DIR/kubernetes

# program : module : package
PROGRAMS="
etcd:etcd:go.etcd.io/etcd/server/v3
kube-apiserver:kubernetes:k8s.io/kubernetes/cmd/kube-apiserver
kubectl:kubernetes:k8s.io/kubernetes/cmd/kubectl
kube-controller-manager:kubernetes:k8s.io/kubernetes/cmd/kube-controller-manager
kube-scheduler:kubernetes:k8s.io/kubernetes/cmd/kube-scheduler
helm:helm:helm.sh/helm/v4/cmd/helm
kubelet:kubernetes:k8s.io/kubernetes/cmd/kubelet
containerd:containerd:github.com/containerd/containerd/v2/cmd/containerd
containerd-shim-runc-v2:containerd:github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2
ctr:containerd:github.com/containerd/containerd/v2/cmd/ctr
runc:runc:github.com/opencontainers/runc
bridge:cni:github.com/containernetworking/plugins/plugins/main/bridge
host-local:cni:github.com/containernetworking/plugins/plugins/ipam/host-local
loopback:cni:github.com/containernetworking/plugins/plugins/main/loopback
portmap:cni:github.com/containernetworking/plugins/plugins/meta/portmap
"
CONTROL_PLANE="etcd kube-apiserver kubectl kube-controller-manager kube-scheduler helm"
NODE="kubelet containerd containerd-shim-runc-v2 ctr runc bridge host-local loopback portmap"

entry_of() { awk -F : -v name="$1" '$1 == name' <<<"$PROGRAMS"; }

OUT=''
WANTED=()
while (($#)); do
    case $1 in
    --out) OUT=$2 && shift 2 ;;
    control-plane) read -ra more <<<"$CONTROL_PLANE" && WANTED+=("${more[@]}") && shift ;;
    node) read -ra more <<<"$NODE" && WANTED+=("${more[@]}") && shift ;;
    all) read -ra more <<<"$CONTROL_PLANE $NODE" && WANTED+=("${more[@]}") && shift ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *)
        [[ -n $(entry_of "$1") ]] || die "build.sh: unknown argument '$1'" "known are --out FILE, control-plane, node, all, and" \
            "$CONTROL_PLANE $NODE"
        WANTED+=("$1") && shift
        ;;
    esac
done
((${#WANTED[@]})) || read -ra WANTED <<<"$CONTROL_PLANE"

CACHE=$(cache_dir)
mkdir -p "$CACHE/logs" 2>/dev/null || die "cannot write into $CACHE, where programs are kept" \
    "make it writable, or name another folder: UNDERSTUDY_CACHE=DIR $0"
CACHE=$(cd "$CACHE" && pwd)
LOG_DIR=$CACHE/logs

declare -A DIRS
for module in etcd kubernetes helm containerd runc cni; do
    DIRS[$module]=$CACHE/bin-$module-$(hash_of "$HERE/$module" "$HERE/build.sh" | cut -c1-12)
done

# The upstream's version, as the module's first requirement says it.
version_of() { awk '$1 == "require" && NF == 3 { print $3; exit }' "$HERE/$1/go.mod"; }

# compile MODULE PACKAGE FILE
compile() {
    local module=$1 version flags='-s -w' tags='' cgo=0
    version=$(version_of "$module")
    case $module in
    # A version of v0.0.0 is one that clients mistrust.
    kubernetes) flags+=" -X k8s.io/component-base/version.gitVersion=$version -X k8s.io/component-base/version.gitTreeState=clean" ;;
    helm) flags+=" -X helm.sh/helm/v4/internal/version.version=$version" ;;
    containerd) flags+=" -X github.com/containerd/containerd/v2/version.Version=${version#v}" ;;
    # Its first steps inside a container are C, and without seccomp ordinary Pods are refused.
    runc) cgo=1 tags=seccomp,netgo,osusergo flags+=' -extldflags=-static' ;;
    esac
    (
        cd "$HERE/$module"
        # The bed's own flags alone: what the user has set would change the product and not its key.
        GOFLAGS='' GOWORK=off CGO_ENABLED=$cgo "$GO" build -mod=readonly -trimpath -buildvcs=false -p 2 \
            -tags "$tags" -ldflags "$flags" -o "$3" "$2"
    )
}

build() {
    local name=$1 module package dir
    IFS=: read -r _ module package < <(entry_of "$name")
    dir=${DIRS[$module]}
    mkdir -p "$dir"
    if [[ -x $dir/$name ]]; then return; fi
    case $name in kube-apiserver | helm) say "  $name $(version_of "$module"): from source; once, some minutes" ;; esac
    step "$name" compile "$module" "$package" "$dir/.$name.tmp" \
        || die "$name $(version_of "$module") could not be built" \
            "its modules come through GOPROXY ($("$GO" env GOPROXY)), which must be reachable the first time;" \
            "tests/bed/setup.sh installs what a build needs; then run this again: $0 $name"
    mv "$dir/.$name.tmp" "$dir/$name"
}

path_of() {
    local module
    IFS=: read -r _ module _ < <(entry_of "$1")
    echo "${DIRS[$module]}/$1"
}

missing=()
for name in "${WANTED[@]}"; do
    if [[ ! -x $(path_of "$name") ]]; then missing+=("$name"); fi
done
if ((${#missing[@]})); then
    # One build at a time; whoever waits finds the programs made.
    exec 9>"$CACHE/kubernetes.lock"
    flock -n 9 || { say "kubernetes: waiting for another build in $CACHE" && flock 9; }
    go_toolchain "$CACHE"
    for name in "${missing[@]}"; do build "$name"; done
    # An older checkout's programs are kept for a while: two branches share a cache.
    for module in "${!DIRS[@]}"; do
        if [[ -d ${DIRS[$module]} ]]; then touch "${DIRS[$module]}"; fi
        find "$CACHE" -maxdepth 1 -type d -name "bin-$module-????????????" -printf '%T@ %p\n' | sort -rn \
            | tail -n +4 | cut -d ' ' -f 2- | xargs -r rm -rf
    done
fi

if [[ -n $OUT ]]; then
    mkdir -p "$(dirname "$OUT")"
    for name in "${WANTED[@]}"; do printf '%s\t%s\n' "$name" "$(path_of "$name")"; done \
        | jq -Rn '[inputs | split("\t") | {(.[0]): .[1]}] | add' >"$OUT.$$.tmp"
    mv "$OUT.$$.tmp" "$OUT"
fi
