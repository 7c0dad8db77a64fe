#!/bin/sh
# Builds the C library and installs it with its header and its pkg-config file: `install.sh PREFIX [PROFILE]`. PROFILE is one of
# cargo's, release by default. DESTDIR goes before all paths, for packages.
set -eu
case ${1:-} in
'' | -*)
    echo "usage: $0 PREFIX [PROFILE]   such as $0 /usr/local; PROFILE is one of cargo's, release if not given" >&2
    exit 2
    ;;
esac
prefix=$1
profile=${2:-release}
case $prefix in /*) ;; *) prefix=$PWD/$prefix ;; esac
to=${DESTDIR:-}$prefix
case $to in /*) ;; *) to=$PWD/$to ;; esac
# Before minutes of compiling.
mkdir -p "$to/include" "$to/lib/pkgconfig"
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"

cargo build -p batchnorm-c --profile "$profile"
case $profile in dev | test) folder=debug ;; *) folder=$profile ;; esac
built=${CARGO_TARGET_DIR:-$here/../../target}/$folder

abi=$(sed -n 's/^#define BN_ABI_VERSION //p' include/batchnorm.h)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
# What Rust's standard library asks of a static link.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
needs=$(echo 'pub fn nothing() {}' |
    rustc --crate-name nothing --crate-type staticlib --print native-static-libs --out-dir "$scratch" - 2>&1 |
    sed -n 's/^note: native-static-libs: //p')

cp include/batchnorm.h "$to/include/"
cp "$built/libbatchnorm_c.a" "$to/lib/"
case $(uname -s) in
Darwin)
    cp "$built/libbatchnorm_c.dylib" "$to/lib/libbatchnorm_c.$abi.dylib"
    ln -sf "libbatchnorm_c.$abi.dylib" "$to/lib/libbatchnorm_c.dylib"
    ;;
*)
    # The name by which programs that were linked with it look for it.
    cp "$built/libbatchnorm_c.so" "$to/lib/libbatchnorm_c.so.$abi"
    ln -sf "libbatchnorm_c.so.$abi" "$to/lib/libbatchnorm_c.so"
    ;;
esac
sed -e "s|@prefix@|$prefix|" -e "s|@version@|$version|" -e "s|@needs@|$needs|" batchnorm.pc.in \
    >"$to/lib/pkgconfig/batchnorm.pc"

echo "installed in $to. To compile with it, unless pkg-config looks there by itself:"
echo "    export PKG_CONFIG_PATH=$prefix/lib/pkgconfig"
echo "    cc program.c \$(pkg-config --cflags --libs batchnorm) -Wl,-rpath,$prefix/lib"
