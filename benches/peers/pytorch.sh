# Installs PyTorch, for scripts that source this file. They set `home`, the directory below target/ that takes it.
python=$home/venv/bin/python

say() { echo "$(basename "$(dirname "$0")"): $*" >&2; }

pip_install() {
    [ -x "$python" ] || python3 -m venv "$home/venv" || return
    "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir "$@" >&2
}

# On x86-64 torch's one build on PyPI is linked to the CUDA libraries, and does not load without them.
pytorch() {
    mkdir -p "$home"
    "$python" -c 'import numpy, torch' 2> "$home/pytorch.log" && return
    if [ "$(df --output=avail -k "$home" | tail -1)" -lt 12000000 ]; then
        say "PyTorch is 6 GB with the libraries that it links to; there is no room for it in $home"
        return 1
    fi
    say "installing PyTorch (3 GB to download)"
    pip_install torch numpy && "$python" -c 'import numpy, torch'
}
