"""PyTorch behind a pipe. A request is a line `type layout n c h w eps`, then x and two dy in that type and layout; the
answer is, in f64, the mean and variance per channel, y, dx for each dy, dgamma and dbeta for the first."""

import sys

import numpy
import torch

TYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
ATEN = torch.ops.aten


def read(dtype, layout, n, c, h, w):
    raw = sys.stdin.buffer.read(n * c * h * w * dtype.itemsize)
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)
    if layout == "NC":
        return tensor.view(n, c)
    # Channels last is a permutation of the memory.
    return tensor.view(n, h, w, c).permute(0, 3, 1, 2) if layout == "NHWC" else tensor.view(n, c, h, w)


def write(layout, tensor):
    tensor = tensor.permute(0, 2, 3, 1) if layout == "NHWC" and tensor.dim() == 4 else tensor
    sys.stdout.buffer.write(tensor.to(torch.float64).contiguous().numpy().tobytes())


def main():
    torch.set_grad_enabled(False)
    print(torch.__version__, flush=True)
    for line in sys.stdin.buffer:
        name, layout, *sizes, eps = line.decode().split()
        dtype, (n, c, h, w), eps = TYPES[name], map(int, sizes), float(eps)
        x, *dys = (read(dtype, layout, n, c, h, w) for _ in range(3))
        # Parameters of halves are kept in f32.
        param = torch.promote_types(dtype, torch.float32)
        gamma, beta, mean, var = (f(c, dtype=param) for f in (torch.ones, torch.zeros, torch.zeros, torch.ones))
        # Momentum 1 leaves the batch's own statistics, the variance with m - 1.
        y, save_mean, save_invstd = ATEN.native_batch_norm(x, gamma, beta, mean, var, True, 1.0, eps)
        m = n * h * w
        back = lambda dy: ATEN.native_batch_norm_backward(
            dy, x, gamma, mean, var, save_mean, save_invstd, True, eps, [True, True, True]
        )
        (dx, dgamma, dbeta), (dx_of_constant, _, _) = map(back, dys)
        for tensor in (save_mean, var.double() * ((m - 1) / m), y, dx, dx_of_constant, dgamma, dbeta):
            write(layout, tensor)
        sys.stdout.buffer.flush()


main()
