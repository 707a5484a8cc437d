# Everything a developer types. `make help` says what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
MAKEFLAGS += --no-print-directory

# Static binaries run in any guest and on any node. The target is named even though it is the
# machine's own, so that the flag does not reach build scripts and procedural macros.
export CARGO_BUILD_TARGET := x86_64-unknown-linux-gnu
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS := -C target-feature=+crt-static
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

BIN := target/$(CARGO_BUILD_TARGET)/debug
BED := $(BIN)/understudy-bed
TIMED := tests/bed/timed.sh

.PHONY: help setup build images image programs chart check test cluster e2e cluster-up cluster-down node-up node-down node-ssh guest-check demo demo-host bench clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing on a Debian 12 machine
	@tests/bed/setup.sh

build: setup ## Build the binaries (static)
	@$(TIMED) build cargo build --workspace --bins

images: build ## Build the guest and node images where they are outdated
	@$(TIMED) images $(BED) images >/dev/null

# Release binaries: what runs on nodes, and small enough to carry.
image: setup ## Build the container images of operator and agent, without a container engine
	@$(TIMED) build-release cargo build --release -p understudy -p understudy-node -p understudy-vmm -p understudy-image --bins
	version=$$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
	target/$(CARGO_BUILD_TARGET)/release/understudy-image --binaries target/$(CARGO_BUILD_TARGET)/release \
	    --output "target/images/understudy-$$version.tar" $(ARGS)

chart: setup ## Write what is generated in the chart: CRDs, schema and table of values
	@$(TIMED) chart cargo run --quiet -p understudy-tests --bin understudy-chartgen

programs: setup ## Build the programs of a Kubernetes cluster where they are outdated
	@$(TIMED) programs tests/bed/kubernetes/build.sh

check: setup ## Formatting, lints, shell scripts, unit tests
	@$(TIMED) format cargo fmt --all --check
	$(TIMED) clippy cargo clippy --workspace --all-targets -- -D warnings
	$(TIMED) shellcheck shellcheck -x tests/bed/*.sh tests/bed/qemu/*.sh tests/bed/kubernetes/*.sh .ci/run
	$(TIMED) unit-tests cargo test --workspace

test: setup ## Everything: check, the tests on a control plane, then the end-to-end tests on a node VM
	@tests/bed/images.sh qemu node guest-base & # beside the compiler; e2e reports its failure
	tests/bed/kubernetes/build.sh all & # as well; cluster and e2e report its failure
	$(MAKE) check
	$(MAKE) cluster
	$(MAKE) e2e

# These are built with the tests' dependencies, so that nothing is built a second time that check has built.
e2e: setup ## End-to-end tests on the node VM; T=name for one of them
	@$(TIMED) build-for-tests cargo build --workspace --bins --tests
	UNDERSTUDY_E2E=1 $(TIMED) end-to-end cargo test --workspace --test e2e -- $(T) $(ARGS)

cluster: setup ## Tests on a real Kubernetes API server; T=name for one of them
	@$(TIMED) build-for-tests cargo build --workspace --bins --tests
	UNDERSTUDY_E2E=1 $(TIMED) cluster cargo test --workspace --test cluster -- $(T) $(ARGS)

demo: build ## The main job on real input: a seamless reboot, and an ordinary one beside it
	@$(BIN)/understudy-demo $(ARGS)

demo-host: build ## A host reboots into its new kernel, its guests' sessions go on; and an ordinary one beside it
	@$(BIN)/understudy-demo-host $(ARGS)

bench: setup ## What it costs, measured in one run: interruption, disk split, freeze, memory; saving and resuming
	@$(TIMED) build-for-tests cargo build --workspace --bins --tests
	$(BIN)/understudy-bench $(ARGS)
	$(if $(ARGS),,cargo test --workspace --test vmm -- figures --ignored --nocapture)

node-up: build ## Start the node VM where it is not up
	@$(BED) node up

node-down: ## Shut the node VM down
	@if [[ -x $(BED) ]]; then $(BED) node down; fi

node-ssh: ## A shell in the node VM
	@$(BED) node ssh

cluster-up: build ## Start a Kubernetes control plane with our CRDs where none runs; it prints its KUBECONFIG
	@$(BED) cluster up

cluster-down: ## Stop the control plane
	@if [[ -x $(BED) ]]; then $(BED) cluster down; fi

guest-check: images ## Boot the guest image in plain QEMU and ask its services
	@$(TIMED) guest-check $(BED) guest-check

clean: ## Remove what was built in the checkout
	@if [[ -x $(BED) ]]; then $(BED) node remove && $(BED) cluster down; fi
	cargo clean
