"""PyTorch behind the line protocol of src/server.rs, in the layout given as argument: NCHW or NHWC (channels last)."""

import pathlib
import sys
import time

import numpy
import torch

EPS = 1e-5
ATEN = torch.ops.aten


class Problem:
    """Inputs in the peer's layout and type, and the call to be timed, which leaves what it computed in `results`."""

    def __init__(self, layout, pass_, dtype, n, c, h, w, threads, directory):
        torch.set_num_threads(threads)
        self.directory = pathlib.Path(directory)
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        memory = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}[layout]
        # Memory of torch's own, so that its alignment is the one that its users have.
        tensor = lambda: torch.empty((n, c, h, w), dtype=dtype).to(memory_format=memory)
        read = lambda name: torch.from_numpy(numpy.fromfile(self.directory / name, numpy.float32))
        x, dy, y = (tensor() for _ in range(3))
        x.copy_(read("x").view(n, c, h, w))
        gamma, beta, mean, var = (read(name).clone() for name in ("gamma", "beta", "mean", "var"))
        save_mean, save_invstd = torch.empty(c), torch.empty(c)
        saved = dict(save_mean=save_mean, save_invstd=save_invstd)
        train = lambda: ATEN.native_batch_norm.out(x, gamma, beta, None, None, True, 0.1, EPS, out=y, **saved)
        infer = lambda: ATEN.native_batch_norm.out(x, gamma, beta, mean, var, False, 0.1, EPS, out=y, **saved)
        # Its `out` variant computes elsewhere and copies, so the plain one is the faster.
        backward = lambda: ATEN.native_batch_norm_backward(
            dy, x, gamma, None, None, save_mean, save_invstd, True, EPS, [True, True, True]
        )
        if pass_ == "backward":
            dy.copy_(read("dy").view(n, c, h, w))
            train()
        self.call = {"forward": train, "inference": infer, "backward": backward}[pass_]
        self.names = ["dx", "dgamma", "dbeta"] if pass_ == "backward" else ["y"]

    def result(self):
        for name, tensor in zip(self.names, self.call()):
            tensor.float().contiguous().numpy().tofile(self.directory / name)

    def time(self, calls):
        for _ in range(calls):
            self.call()
        started = time.perf_counter()
        for _ in range(calls):
            self.call()
        return (time.perf_counter() - started) * 1e6 / calls


def main():
    torch.set_grad_enabled(False)
    layout = sys.argv[1]
    problem = None
    print("ok", torch.__version__, flush=True)
    for line in sys.stdin:
        try:
            match line.rstrip("\n").split(" ", 8):
                case ["setup", pass_, dtype, n, c, h, w, threads, directory]:
                    problem = None  # gives back its memory first
                    problem = Problem(layout, pass_, dtype, int(n), int(c), int(h), int(w), int(threads), directory)
                    answer = f"aten {torch.backends.cpu.get_cpu_capability()}"
                case ["result"]:
                    problem.result()
                    answer = ""
                case ["time", calls]:
                    answer = problem.time(int(calls))
                case _:
                    raise ValueError(f"no such request: {line!r}")
            print("ok", answer, flush=True)
        except Exception as error:  # whatever it is, the driver is to hear of it
            print("error", " ".join(str(error).split()), flush=True)


main()
