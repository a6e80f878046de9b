# Everything a contributor runs. Each target installs what it needs and lacks (Debian), so that a fresh clone is enough.

# What is tested is what the image ships: PCRE2 inside the binary, whether or not this machine has the library.
export PCRE2_SYS_STATIC := 1
# Debian keeps varnishd in sbin, which is not on everybody's PATH.
export PATH := $(PATH):/usr/sbin

TARGET := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET)/release/clearcoat
# Debian's is the older one, as a program of its own.
COMPOSE = $(shell if docker compose version >/dev/null 2>&1; then echo docker compose; else echo docker-compose; fi)
DENY := $(TARGET)/tools/cargo-deny/bin/cargo-deny --locked check
TAG ?= dev
# Tests wait half of their time, for processes of theirs.
TEST_THREADS ?= $(shell expr $$(nproc) + $$(nproc) / 2)
IMAGE ?= clearcoat:$(TAG)
DEB = $(TARGET)/debian/clearcoat_$(VERSION)-1_$(shell dpkg --print-architecture).deb
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

.PHONY: help demo build test soak mutants lint advisories bench bench-quick instructions book image image-test deb deb-test sbom release-files compose compose-images compose-test clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: ## a whole fleet on this machine, with real Varnish; Ctrl-C ends it
	@deploy/install-deps.sh --for demo
	cargo build --release --locked
	@exec $(BIN) demo

build: ## the release binary
	@deploy/install-deps.sh --for build
	cargo build --release --locked

test: ## the whole suite, against real Varnish and etcd
	@deploy/install-deps.sh --for test
	RUST_TEST_THREADS=$(TEST_THREADS) cargo test --locked --no-fail-fast
	tests/vtc/run.sh
	tests/api/run.sh

soak: ## the consistency test with every fault, for SEEDS (1 2 3 4 5), SECONDS (120) each (root: slow link and frozen disk)
	@deploy/install-deps.sh --for test
	cargo test --locked --test it --no-run
	for seed in $(or $(SEEDS),1 2 3 4 5); do \
		CLEARCOAT_SEED=$$seed CLEARCOAT_CONSISTENCY_SECONDS=$(or $(SECONDS),120) \
			cargo test --locked --test it -- --test-threads 1 consistency::no_page || exit 1; \
	done

mutants: ## breaks one part of the promise after the other, in a build of its own: a test has to notice each (three minutes)
	@deploy/install-deps.sh --for test
	cargo test --locked --features mutants --test it -- mutants::

lint: book ## format, clippy, rustdoc, dependencies, shellcheck and the book, as CI wants them
	@deploy/install-deps.sh --for lint
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --features mutants --bins --test it -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items
	$(DENY) licenses bans sources
	shellcheck .ci/run deploy/*.sh deploy/deb/p* deploy/compose/*.sh examples/*.sh tests/api/run.sh

advisories: ## known holes in dependencies; not a part of lint, as it needs github.com and changes without a commit of ours
	@deploy/install-deps.sh --for advisories
	$(DENY) advisories

bench: ## ratios against HAProxy and nginx, and Magento's way to purge (root or user namespaces; half an hour)
	@deploy/install-deps.sh --for bench
	cargo bench --locked

bench-quick: ## the plain HTTP/1.1 scenarios against HAProxy and nginx, in short rounds
	@deploy/install-deps.sh --for bench
	cargo bench --locked --bench data_path -- --quick

instructions: ## user instructions per request, against those kept in benches/instructions.txt (UPDATE=1 keeps the new ones)
	@deploy/install-deps.sh --for bench
	cargo bench --locked --bench instructions -- $(if $(UPDATE),update,check)

book: ## the documents as a book (target/book)
	@deploy/install-deps.sh --for book
	$(TARGET)/tools/mdbook/bin/mdbook build --dest-dir $(abspath $(TARGET))/book

image: ## the container image, also where no base image can be pulled (IMAGE=clearcoat:dev)
	@deploy/install-deps.sh --for build
	deploy/build-image.sh $(IMAGE)

image-test: image ## run the image: check, serve, purge, restart, stop; and as the agent of a node
	@deploy/install-deps.sh --for image-test
	deploy/test-image.sh $(IMAGE)

deb: ## the Debian package, for the Debian that it is built on (target/debian)
	@deploy/install-deps.sh --for deb
	deploy/build-deb.sh

deb-test: deb ## install the package where a real systemd runs: start, purge, watchdog, upgrade, remove
	@deploy/install-deps.sh --for deb-test
	deploy/test-deb.sh $(DEB)

sbom: deb ## the bill of materials of the release binary, in CycloneDX (target/release/clearcoat.cdx.json)
	@deploy/install-deps.sh --for sbom
	$(TARGET)/tools/auditable2cdx/bin/auditable2cdx $(BIN) >$(BIN).cdx.json

release-files: deb sbom ## what a release has beside the image, with checksums (target/release-files)
	rm -rf $(TARGET)/release-files
	mkdir -p $(TARGET)/release-files
	cp $(DEB) $(BIN).cdx.json $(TARGET)/release-files
	cd $(TARGET)/release-files && sha256sum -- * >SHA256SUMS

compose-images: image ## the images of compose.yaml, with TAG=dev, also where none can be pulled
	deploy/compose/build-images.sh $(TAG)

compose: compose-images ## a whole shop in containers: three etcd, two clearcoat, three Varnish, two web nodes (docs/compose.md)
	@deploy/install-deps.sh --for compose-test
	CLEARCOAT_TAG=$(TAG) $(COMPOSE) up --detach
	@echo "http://127.0.0.1:8080/ is the shop, http://127.0.0.1:9180/ the status page; '$(COMPOSE) down' ends it"

compose-test: compose-images ## compose.yaml under load: scaled, killed, paused, cut off, recreated; nothing is refused, nothing stale
	@deploy/install-deps.sh --for compose-test
	deploy/test-compose.sh $(TAG)

clean: ## remove what cargo built
	cargo clean
