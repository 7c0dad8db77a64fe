#!/usr/bin/env bash
# Whether kernels are compiled whole: `tests/inlined.sh FILE...`, optimized libraries or programs. An intrinsic with a function of its
# own is called by code that was not inlined into a kernel and lacks its tier, which takes twenty times as long.
set -euo pipefail

for file; do
    symbols=$(nm -C "$file" 2>/dev/null) || { echo "$file: not to be read"; exit 1; }
    grep -q 'batchnorm::' <<<"$symbols" || { echo "$file: no symbols"; exit 1; }
    if apart=$(grep -oE 'core_arch::x86::(avx|f16c|fma)[a-z0-9]*::\w+' <<<"$symbols" | sort -u); then
        printf '%s: not inlined into their kernels:\n%s\n' "$file" "$apart"
        exit 1
    fi
done
