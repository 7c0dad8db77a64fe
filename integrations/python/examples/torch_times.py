"""Times the layer of torch_autograd.py against PyTorch's own, in turns, in float32: medians in microseconds and their ratio.

python examples/torch_times.py --threads 2 --turns 30
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch_autograd import BatchNorm2d, step

SHAPES = [
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads; ours are RAYON_NUM_THREADS")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, medians of {arguments.turns}, microseconds")
    print(f"{'N x C x H x W':>20} {'lies':>14} {'pass':>22} {'torch':>9} {'here':>9} {'ratio':>6}")
    for shape in SHAPES[-2:] if arguments.quick else SHAPES:
        for name, memory_format in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
            x, dy = (torch.randn(shape).to(memory_format=memory_format) for _ in range(2))
            layers = dict(torch=torch.nn.BatchNorm2d(shape[1]), here=BatchNorm2d(shape[1]))
            for what in ("forward", "forward and backward"):
                taken: dict[str, list[float]] = {key: [] for key in layers}
                for turn in range(arguments.turns + 2):
                    for key, layer in layers.items():
                        layer.zero_grad()
                        start = time.perf_counter()
                        if what == "forward":
                            with torch.no_grad():
                                layer(x)
                        else:
                            step(layer, x, dy)
                        # The first turns warm up.
                        if turn > 1:
                            taken[key].append(time.perf_counter() - start)
                medians = {key: statistics.median(times) * 1e6 for key, times in taken.items()}
                sizes = " x ".join(map(str, shape))
                ratio = medians["torch"] / medians["here"]
                print(f"{sizes:>20} {name:>14} {what:>22} {medians['torch']:9.0f} {medians['here']:9.0f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
