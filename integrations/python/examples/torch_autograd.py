"""Batch Normalization for PyTorch models on the CPU, as a torch.autograd.Function over this package.

Tensors and numpy arrays share memory, so nothing is copied. As a program it compares a layer with PyTorch's own: outputs,
gradients and running statistics, in float32 and float64, contiguous and channels last; and runs torch.autograd.gradcheck.

    python examples/torch_autograd.py
"""

from __future__ import annotations

from typing import Any

import batchnorm
import torch


def lies_as(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor if it is dense, contiguous or channels last, and lies as `like` if that is given; else a copy that does."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    like = tensor if like is None else like
    if like.is_contiguous() or like.dim() not in formats:
        return tensor.contiguous()
    return tensor.contiguous(memory_format=formats[like.dim()])


def array(tensor: torch.Tensor | None) -> Any:
    """The memory of a tensor as a numpy array."""
    return None if tensor is None else tensor.detach().numpy()


class BatchNormFunction(torch.autograd.Function):
    """Training forward and backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gamma: Any, beta: Any, eps: float, running: Any) -> torch.Tensor:
        x = lies_as(x.detach())
        y, saved = batchnorm.forward_train(x.numpy(), array(gamma), array(beta), eps=eps)
        ctx.save_for_backward(x, gamma)
        ctx.saved = saved
        running(saved)
        return torch.from_numpy(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gamma = ctx.saved_tensors
        names = zip(batchnorm.Gradients._fields, ctx.needs_input_grad[:3], strict=True)
        want = [name for name, wanted in names if wanted]
        gradients = batchnorm.backward(x.numpy(), lies_as(dy, x).numpy(), ctx.saved, array(gamma), want=want)
        return *(None if gradient is None else torch.from_numpy(gradient) for gradient in gradients), None, None


class BatchNorm2d(torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with its state and its arguments, computed by this package. 1d and 3d layers go the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        if self.training or not self.track_running_stats:
            return BatchNormFunction.apply(x, self.weight, self.bias, self.eps, self._update)
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError("gradients in evaluation: wrap the call in torch.no_grad()")
        lines = (self.running_mean, self.running_var, self.weight, self.bias)
        return torch.from_numpy(batchnorm.forward_infer(array(lies_as(x)), *map(array, lines), eps=self.eps))

    def _update(self, saved: batchnorm.Saved) -> None:
        if not self.track_running_stats or not self.training:
            return
        momentum = (
            dict(batches=int(self.num_batches_tracked)) if self.momentum is None else dict(weight_of_new=self.momentum)
        )
        batchnorm.update_running(array(self.running_mean), array(self.running_var), saved, unbiased=True, **momentum)
        self.num_batches_tracked += 1


def step(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that a training step of a layer makes."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    made = dict(y=y.detach(), dx=x.grad, dgamma=layer.weight.grad, dbeta=layer.bias.grad)
    return made | dict(mean=layer.running_mean, var=layer.running_var)


def compare(dtype: torch.dtype, memory_format: torch.memory_format, momentum: float | None) -> dict[str, float]:
    """The largest differences from PyTorch's layer after three steps and an inference, relative to the largest value."""
    generator = torch.Generator().manual_seed(1)
    layers = [kind(6, eps=1e-3, momentum=momentum, dtype=dtype) for kind in (BatchNorm2d, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in ("weight", "bias"):
            values = torch.randn(6, generator=generator, dtype=dtype)
            for layer in layers:
                getattr(layer, parameter).copy_(values)
    differences: dict[str, float] = {}

    def note(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
        for name, value in ours.items():
            difference = float((value - theirs[name]).abs().max() / theirs[name].abs().max())
            differences[name] = max(difference, differences.get(name, 0.0))

    for _ in range(3):
        x, dy = (torch.randn(8, 6, 9, 7, generator=generator, dtype=dtype) * 3 + 1 for _ in range(2))
        x, dy = x.to(memory_format=memory_format), dy.to(memory_format=memory_format)
        for layer in layers:
            layer.zero_grad()
        ours, theirs = (step(layer, x, dy) for layer in layers)
        assert ours["y"].stride() == theirs["y"].stride() and ours["dx"].stride() == theirs["dx"].stride()
        note(ours, theirs)
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    assert layers[0].num_batches_tracked == layers[1].num_batches_tracked == 3
    with torch.no_grad():
        note(*(dict(inferred=layer.eval()(x)) for layer in layers))
    return differences


def main() -> None:
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for momentum in (0.1, None):
                differences = compare(dtype, memory_format, momentum)
                print(
                    f"{dtype}, {memory_format}, momentum {momentum}:", *(f"{k} {v:.1e}" for k, v in differences.items())
                )
                assert max(differences.values()) <= bound, f"expected at most {bound}"
    arguments = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 3, 2, 2), (3,), (3,))]
    assert torch.autograd.gradcheck(
        lambda x, g, b: BatchNormFunction.apply(x, g, b, 1e-3, lambda saved: None), arguments
    )
    # A gradient that does not lie dense, as the sum's does not.
    BatchNorm2d(3, dtype=torch.float64)(arguments[0]).sum().backward()
    print("gradcheck: passed")


if __name__ == "__main__":
    main()
