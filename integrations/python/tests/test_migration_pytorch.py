"""The rows of docs/migrate/pytorch.md, each beside torch."""

import batchnorm
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: tests/frameworks.sh installs it")
nn = torch.nn


def layer(case, kind=nn.BatchNorm1d, **options):
    """A layer in float64 with the parameters and statistics of a case, as far as it has any."""
    bn = kind(len(case.gamma), dtype=torch.float64, **options)
    state = {"weight": case.gamma, "bias": case.beta, "running_mean": case.mean, "running_var": case.var}
    bn.load_state_dict({name: torch.tensor(value) for name, value in state.items() if name in bn.state_dict()}, strict=False)
    return bn


def tensor(array):
    return torch.tensor(array, requires_grad=True)


def array(tensor):
    return tensor.detach().numpy()


def test_page(page):
    page("pytorch").run()
    assert page("pytorch").lists("rust") == page("pytorch").lists("python")


def test_defaults():
    bn = nn.BatchNorm2d(3)
    assert (bn.eps, bn.momentum, bn.affine, bn.track_running_stats) == (1e-5, 0.1, True, True)
    assert list(bn.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert [array(value).tolist() for value in bn.state_dict().values()] == [[1] * 3, [0] * 3, [0] * 3, [1] * 3, 0]


def test_parameters(case, same):
    c = case()
    x = tensor(c.x)
    bn = layer(c)
    y = bn(x)
    y.backward(torch.tensor(c.dy))
    got, saved = batchnorm.forward_train(c.x, c.gamma, c.beta)
    gradients = batchnorm.backward(c.x, c.dy, saved, c.gamma, c.beta)
    same(got, array(y))
    for got, expected in zip(gradients, (x.grad, bn.weight.grad, bn.bias.grad), strict=True):
        same(got, array(expected))


def test_affine_false(case, same):
    c = case()
    y = layer(c, affine=False)(tensor(c.x))
    same(batchnorm.forward_train(c.x)[0], array(y))


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_momentum_and_unbiased_variance(case, same, momentum):
    c = case()
    bn = layer(c, momentum=momentum)
    for scale in (1.0, -2.0):
        bn(torch.tensor(scale * c.x))
        _, saved = batchnorm.forward_train(scale * c.x)
        batchnorm.update_running(c.mean, c.var, saved, weight_of_new=momentum, unbiased=True)
    same(c.mean, array(bn.running_mean))
    same(c.var, array(bn.running_var))


def test_momentum_none(case, same):
    c = case()
    bn = layer(c, momentum=None)
    for batches, scale in enumerate((1.0, -2.0, 3.0)):
        bn(torch.tensor(scale * c.x))
        _, saved = batchnorm.forward_train(scale * c.x)
        batchnorm.update_running(c.mean, c.var, saved, batches=batches, unbiased=True)
    assert bn.num_batches_tracked == 3
    same(c.mean, array(bn.running_mean))
    same(c.var, array(bn.running_var))


def test_eval(case, same):
    c = case()
    y = layer(c, eps=1e-2).eval()(torch.tensor(c.x))
    same(batchnorm.forward_infer(c.x, c.mean, c.var, c.gamma, c.beta, eps=1e-2), array(y))


def test_track_running_stats_false(case, same):
    c = case()
    bn = layer(c, track_running_stats=False).eval()
    assert bn.running_mean is None
    same(batchnorm.forward_train(c.x, c.gamma, c.beta)[0], array(bn(torch.tensor(c.x))))


def test_frozen(case, same):
    """The gradients are those of docs/variants.md, which tests/variants compares with `freeze`."""
    c = case()
    x, bn = tensor(c.x), layer(c).eval()
    bn(x).backward(torch.tensor(c.dy))
    scale = c.gamma / np.sqrt(c.var + bn.eps)
    xhat = batchnorm.forward_infer(c.x, c.mean, c.var)
    same(c.per_channel(scale) * c.dy, array(x.grad))
    same(c.sums(c.dy * xhat), array(bn.weight.grad))
    same(c.sums(c.dy), array(bn.bias.grad))
    assert bn.num_batches_tracked == 0


def test_some_gradients(case, same):
    c = case()
    x, bn = tensor(c.x), layer(c).requires_grad_(False)
    bn(x).backward(torch.tensor(c.dy))
    _, saved = batchnorm.forward_train(c.x, c.gamma, c.beta)
    gradients = batchnorm.backward(c.x, c.dy, saved, c.gamma, c.beta, want="dx")
    same(gradients.dx, array(x.grad))
    assert gradients.dgamma is None and bn.weight.grad is None


@pytest.mark.parametrize(
    "kind, shape",
    [
        (nn.BatchNorm1d, (8, 3)),
        (nn.BatchNorm1d, (4, 3, 5)),
        (nn.BatchNorm2d, (4, 3, 5, 6)),
        (nn.BatchNorm3d, (2, 3, 4, 5, 6)),
    ],
)
def test_dimensions(case, same, kind, shape):
    c = case(shape)
    same(batchnorm.forward_train(c.x, c.gamma, c.beta)[0], array(layer(c, kind)(torch.tensor(c.x))))


def test_channels_last(case, same):
    c = case((4, 3, 5, 6))
    x = torch.tensor(c.x).contiguous(memory_format=torch.channels_last)
    y = layer(c, nn.BatchNorm2d)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The same memory, as what it is: NHWC.
    memory = x.numpy().transpose(0, 2, 3, 1)
    assert memory.flags.c_contiguous
    got, _ = batchnorm.forward_train(memory, c.gamma, c.beta, layout="NHWC")
    same(got.transpose(0, 3, 1, 2), array(y))


@pytest.mark.parametrize("name, digits", [("bfloat16", 8), ("float16", 11)])
def test_mixed_precision(case, same, name, digits):
    numpy_type = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    c = case()
    x = torch.tensor(c.x).to(getattr(torch, name))
    bn = nn.BatchNorm1d(3)
    bn.weight.data, bn.bias.data = torch.tensor(c.gamma).float(), torch.tensor(c.beta).float()
    y = bn(x)
    assert y.dtype == x.dtype and bn.running_mean.dtype == torch.float32
    here = x.float().numpy().astype(numpy_type)
    got, saved = batchnorm.forward_train(here, c.gamma, c.beta)
    assert saved.mean.dtype == np.float32
    # An ulp: both round once, from values that differ in the last bits of float32.
    same(got.astype(np.float64), array(y.double()), 2.0 ** (1 - digits))
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    batchnorm.update_running(mean, var, saved, weight_of_new=0.1, unbiased=True)
    same(mean, array(bn.running_mean), 1e-6)
    same(var, array(bn.running_var), 1e-6)


def test_one_value(case):
    c = case((1, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(c)(torch.tensor(c.x))
    y, saved = batchnorm.forward_train(c.x, c.gamma, c.beta)
    assert y.tolist() == [c.beta.tolist()]
    with pytest.raises(ValueError, match="the unbiased variance needs at least two values per channel, got 1"):
        batchnorm.update_running(c.mean, c.var, saved, weight_of_new=0.1, unbiased=True)


def test_numbers():
    """A mean of 1e4 standard deviations in float32: which of the two is off."""
    x = np.random.default_rng(1).normal(1e4, 1.0, (64, 3, 28, 28)).astype(np.float32)
    exact = (x - x.mean((0, 2, 3), np.float64, keepdims=True)) / x.std((0, 2, 3), np.float64, keepdims=True)

    def off(y):
        return np.max(np.abs(y - exact) / np.maximum(1.0, np.abs(exact)))

    theirs = nn.functional.batch_norm(torch.tensor(x), None, None, training=True, eps=1e-30).numpy()
    assert off(batchnorm.forward_train(x, eps=0.0)[0]) < 3e-7
    assert off(theirs) > 1e-5
