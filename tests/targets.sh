#!/usr/bin/env bash
# Runs the tests on other builds and other CPUs, which must give the hashes of tests/hashes.txt too: all parts, or those
# named, as in `tests/targets.sh aarch64 i686`. On Debian, as root, it installs what it needs. docs/testing.md says more.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
built=${CARGO_TARGET_DIR:-$root/target}/targets
export CARGO_TARGET_DIR=$built
host=$(rustc -vV | sed -n 's/^host: //p')

step() { printf '\n== %s\n' "$*"; }

need() { dpkg -s "$@" &>/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends "$@"; }; }

# The same package with the development dependencies of these tests alone: the others do not build everywhere.
package=$built/package
mkdir -p "$package"
{
    sed '/^\[dev-dependencies\]/,$d' Cargo.toml
    printf '[dev-dependencies]\nproptest = { version = "1.12", default-features = false, features = ["std"] }\n'
    sed -n '/^\[dev-dependencies\]/,/^$/p' Cargo.toml | grep -E '^rand(_chacha)? = '
    printf '[lib]\npath = "%s/src/lib.rs"\n' "$root"
    printf '[[example]]\nname = "tiers"\npath = "%s/examples/tiers.rs"\n' "$root"
    for test in tests/*.rs tests/*/main.rs; do
        name=${test#tests/}
        name=${name%.rs}
        printf '[[test]]\nname = "%s"\npath = "%s/%s"\n' "${name%/main}" "$root" "$test"
    done
    printf '[workspace]\n'
} >"$package/Cargo.toml"
cp Cargo.lock "$package"
suite=(--release --manifest-path "$package/Cargo.toml" --lib --test hashes --test bits --test variants --test literal)
# Where an emulator would take long.
brief=(-- --skip random_cases --skip batches_of_channels)

release() { cargo test "${suite[@]}" --features half "$@"; }

native() { RUSTFLAGS="-C target-cpu=native" CARGO_TARGET_DIR=$built/native cargo test "${suite[@]}" --features half; }

sequential() { cargo test "${suite[@]}" --no-default-features --features half; }

# A CPU with SSE2 and SSE3 alone, emulated.
sse2() {
    need qemu-user
    local runner=CARGO_TARGET_$(tr a-z- A-Z_ <<<"$host")_RUNNER
    export "$runner=qemu-x86_64 -cpu qemu64"
    local tiers
    tiers=$(cargo run -q --release --manifest-path "$package/Cargo.toml" --example tiers)
    [ "$tiers" = portable ] || { echo "expected the portable tier alone, got: $tiers"; return 1; }
    release "${brief[@]}"
    unset "$runner"
}

# Debian's compiler, with the standard library built from the source that belongs to it.
elsewhere() {
    need rustc-web cargo-web rust-web-src
    local target=$1
    shift
    RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 /usr/bin/cargo test -Zbuild-std=std,panic_abort,test --target "$target" "${suite[@]}" "$@"
}

aarch64() {
    need gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
        elsewhere aarch64-unknown-linux-gnu --features half "${brief[@]}"
}

# Runs without an emulator. Index arithmetic of 32 bits is checked.
i686() {
    need gcc-i686-linux-gnu libc6-dev-i386-cross
    local lib=/usr/i686-linux-gnu/lib
    CARGO_TARGET_I686_UNKNOWN_LINUX_GNU_LINKER=i686-linux-gnu-gcc \
        CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
        CARGO_TARGET_I686_UNKNOWN_LINUX_GNU_RUNNER="$lib/ld-linux.so.2 --library-path $lib" \
        elsewhere i686-unknown-linux-gnu --features half --test contract --test running
}

# simd128, in the WebAssembly of Node.js. There are no threads and no unwinding. Debian's wasi-libc is older than what the
# standard library was written for, which names two functions of threads that it lacks; a call of them would trap.
wasm32() {
    need wasi-libc lld-22
    local lib=/usr/lib/wasm32-wasi run=$built/wasi.mjs
    cat >"$run" <<'END'
import { readFile } from 'node:fs/promises';
import { WASI } from 'node:wasi';
const [path, ...args] = process.argv.slice(2);
const wasi = new WASI({ version: 'preview1', args: [path, ...args, '--test-threads=1'], env: process.env });
const { instance } = await WebAssembly.instantiate(await readFile(path), wasi.getImportObject());
process.exitCode = wasi.start(instance);
END
    # With its own threads, Node.js 20 may crash when it leaves, after all tests passed.
    CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings --single-threaded $run" \
        CARGO_TARGET_WASM32_WASIP1_RUSTFLAGS="-C target-feature=+simd128 -C linker=wasm-ld-22 -C link-self-contained=no
            -C link-arg=$lib/crt1-command.o -C link-arg=--unresolved-symbols=ignore-all -L native=$lib" \
        elsewhere wasm32-wasip1 --no-default-features --features half
}

# A CPU with AVX-512: a computer that Bochs emulates, whose kernel runs one of the tests as its first process. Debian's Bochs, 2.7,
# rounds ties of f16 upwards, so there is no f16 here; and its compact form of saved registers is not what the kernel expects.
avx512() {
    need bochs bochs-term bochsbios isolinux syslinux-common xorriso busybox-static cpio
    local disk=$built/bochs linux
    linux=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/ *Depends: \(linux-image-[0-9].*\)/\1/p')
    rm -rf "$disk"
    mkdir -p "$disk"/{root/bin,iso}
    cd "$disk"
    apt-get download -q "$linux"
    dpkg -x "$linux"_*.deb .
    cp boot/vmlinuz-* iso/linux
    cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 iso
    cp /bin/busybox root/bin
    cat >iso/isolinux.cfg <<'END'
default tests
label tests
kernel linux
append initrd=root console=ttyS0 quiet mitigations=off clearcpuid=xsavec,xsaves
END
    cat >bochsrc <<'END'
display_library: rfb, options="timeout=0"
cpu: model=corei7_skylake_x
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=output
END
    cat >run <<'END'
#!/bin/bash
set -euo pipefail
cd "$(dirname "$0")"
cp "$1" root/test
cat >root/init <<INIT
#!/bin/busybox sh
BATCHNORM_TEST_TIERS=avx512 /test ${*:2} && echo passed
busybox sleep 1
busybox poweroff -f
INIT
chmod +x root/init
(cd root && find . | cpio -o -H newc --quiet | gzip -1) >iso/root
xorriso -as mkisofs -quiet -o disk.iso -b isolinux.bin -no-emul-boot -boot-load-size 4 -boot-info-table iso
rm -f output
bochs -q -f bochsrc -rc <(echo continue) &>log </dev/null || true
cat output
grep -q '^passed' output
END
    chmod +x run
    cd "$root"
    # A target that is named keeps the flags from what is run here to build.
    export "CARGO_TARGET_$(tr a-z- A-Z_ <<<"$host")_RUNNER=$disk/run" RUSTFLAGS="-C target-feature=+crt-static"
    cargo test --target "$host" "${suite[@]}" "${brief[@]}"
    cargo test --target "$host" "${suite[@]}" --features half -- bf16 "${brief[@]:1}"
    unset "CARGO_TARGET_$(tr a-z- A-Z_ <<<"$host")_RUNNER" RUSTFLAGS
}

parts=("$@")
[ $# -gt 0 ] || parts=(release native sequential sse2 aarch64 i686 wasm32)
for part in "${parts[@]}"; do
    step "$part"
    time "$part"
done
step "done"
