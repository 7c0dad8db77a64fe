"""The examples with PyTorch, where it is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "command", [["torch_autograd.py"], ["torch_times.py", "--quick", "--turns", "1"]], ids=lambda c: c[0]
)
def test_example(command):
    subprocess.run([sys.executable, EXAMPLES / command[0], *command[1:]], check=True, capture_output=True)
