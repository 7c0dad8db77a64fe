#!/usr/bin/env bash
# Runs the tests of docs/migrate beside PyTorch, Keras, ONNX and onnxruntime: installs below target/ those that are missing, and
# this package. PyTorch is shared with benches/peers; a framework on PYTHONPATH is taken as it is. Arguments go to pytest.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
home=$(mkdir -p "$target/peers" && cd "$target/peers" && pwd)
. "$root/benches/peers/pytorch.sh"

pip_install pytest keras onnx ml_dtypes "$here/.."
pip_install onnxruntime || say "onnxruntime is absent; its test is skipped"
pytorch || say "PyTorch is absent; its tests and those of Keras are skipped"
# Skipped tests are listed with the reason.
exec "$python" -m pytest -rs "$here"/test_migration_*.py "$@"
