#!/usr/bin/env bash
# What the crate depends on, and what depends on it: licences, sources, advisories, each feature alone, least versions, the public
# interface. `tests/supply-chain.sh [deny] [features] [minimal] [semver]`, all of them by default. See docs/testing.md.
set -euo pipefail
cd "$(dirname "$0")/.."

has() { cargo "$1" --version >/dev/null 2>&1 || cargo install --locked "cargo-$1"; }

for check in "${@:-deny features minimal semver}"; do
    for check in $check; do
        case $check in
        deny)
            has deny
            cargo deny --workspace check licenses sources
            # Which versions candle and burn have of what is theirs to choose.
            cargo deny --workspace --exclude batchnorm-candle --exclude batchnorm-burn check bans
            # Needs the network, or a database that was fetched before.
            cargo deny --workspace check advisories || echo "advisories: not checked or not clean, see above"
            ;;
        features)
            has hack
            cargo hack check --each-feature --no-dev-deps
            ;;
        minimal)
            # The least versions that Cargo.toml allows, in a copy, so that Cargo.lock stays.
            copy=$(mktemp -d)
            trap 'rm -rf "$copy"' EXIT
            cp -r Cargo.toml README.md src docs examples tests benches "$copy"
            (
                cd "$copy"
                # Without the members, whose dependencies ask for newer versions of the same.
                sed -i '/^members = /d' Cargo.toml
                cargo +nightly update -Zdirect-minimal-versions
                CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$copy/target}/minimal cargo test --all-features --test literal --test contract
            )
            ;;
        semver)
            has semver-checks
            # Against the release before, or any commit: BASELINE=<revision>.
            cargo semver-checks --all-features --baseline-rev "${BASELINE:-$(git describe --tags --abbrev=0 2>/dev/null || echo HEAD)}"
            ;;
        *)
            echo "expected deny, features, minimal or semver, got $check" >&2
            exit 2
            ;;
        esac
    done
done
