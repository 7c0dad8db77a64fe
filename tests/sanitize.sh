#!/usr/bin/env bash
# Memory checks of the test suite: `tests/sanitize.sh address|valgrind|unsafe`. See docs/testing.md.
set -euo pipefail
cd "$(dirname "$0")/.."

host=x86_64-unknown-linux-gnu
# Artifacts of their own: other flags would rebuild everything each time.
target=${CARGO_TARGET_DIR:-target}

case "${1:?expected address, valgrind or unsafe}" in
address)
    # All tests on all tiers; each slice of the heap has red zones at both ends, those of tests/guarded.rs pages.
    export CARGO_TARGET_DIR=$target/address RUSTFLAGS=-Zsanitizer=address RUSTDOCFLAGS=-Zsanitizer=address
    cargo +nightly test --all-features --target $host --lib --tests
    cargo +nightly test --all-features --target $host --doc
    ;;
valgrind)
    # Valgrind has no AVX-512 and tells programs so; the tiers are named so that a missing one fails. It is slow, so this runs
    # what reaches every kernel: worked cases, bad arguments, data of all kinds on shapes of each geometry, variants.
    export BATCHNORM_TEST_TIERS=portable,avx2 PROPTEST_CASES=2
    # Optimized further, is_finite becomes "ordered and not equal", which valgrind 3.19 takes for true of a NaN.
    export CARGO_TARGET_DIR=$target/valgrind CARGO_PROFILE_DEV_OPT_LEVEL=1
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=9 --leak-check=no"
    cargo test --all-features --lib --test literal --test contract
    cargo test --all-features --test bits -- corner_cases random_cases
    cargo test --all-features --test variants
    ;;
unsafe)
    # Blocks, functions, implementations and traits, by file.
    for file in $(grep -rlw unsafe src distributed/src integrations/*/src --include=*.rs | sort); do
        count() { sed 's#//.*##' "$file" | grep -oE "$1" | wc -l; }
        printf '%-32s %4d blocks %4d functions %2d impls\n' "$file" \
            "$(count 'unsafe \{')" "$(count 'unsafe fn')" "$(count 'unsafe impl')"
    done
    ;;
*)
    exec "$0"
    ;;
esac
