"""The rows of docs/migrate/keras.md, each beside Keras on its torch backend, which spares TensorFlow."""

import os

import batchnorm
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: tests/frameworks.sh installs it")
os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras", reason="Keras is not installed: tests/frameworks.sh installs it")

# Keras asks torch's tensors for numpy arrays as numpy 1 did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EPS = 1e-3


@pytest.fixture
def case(case):
    """Keras has the channels last, and computes in float32, see test_float64."""

    def rounded(shape=(4, 5, 3), axis=-1):
        c = case(shape, axis)
        for name in ("x", "dy", "gamma", "beta", "mean", "var"):
            setattr(c, name, getattr(c, name).astype(np.float32))
        return c

    return rounded


@pytest.fixture
def same(same):
    """To some units in the last place of float32."""
    return lambda got, expected, bound=2e-6: same(got, expected, bound)


def layer(case, **options):
    """A layer with the parameters and statistics of a case, as far as it has any."""
    bn = keras.layers.BatchNormalization(**{"axis": case.axis} | options)
    bn.build(case.x.shape)
    names = {"gamma": case.gamma, "beta": case.beta, "moving_mean": case.mean, "moving_variance": case.var}
    for weight in bn.weights:
        weight.assign(names[weight.name])
    return bn


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def test_page(page):
    page("keras").run()
    assert page("keras").lists("rust") == page("keras").lists("python")


def test_defaults():
    bn = keras.layers.BatchNormalization()
    bn.build((None, 3))
    assert (bn.axis, bn.momentum, bn.epsilon, bn.center, bn.scale, bn.renorm) == (-1, 0.99, EPS, True, True, False)
    assert [weight.name for weight in bn.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]
    assert [array(weight).tolist() for weight in bn.weights] == [[1] * 3, [0] * 3, [0] * 3, [1] * 3]


def test_parameters(case, same):
    c = case()
    bn = layer(c)
    x = torch.tensor(c.x, requires_grad=True)
    y = bn(x, training=True)
    y.backward(torch.tensor(c.dy))
    got, saved = batchnorm.forward_train(c.x, c.gamma, c.beta, eps=EPS, layout="NLC")
    gradients = batchnorm.backward(c.x, c.dy, saved, c.gamma, c.beta)
    same(got, array(y))
    for got, expected in zip(gradients, (x.grad, bn.gamma.value.grad, bn.beta.value.grad), strict=True):
        same(got, array(expected))


@pytest.mark.parametrize("momentum", [0.99, 0.3])
def test_momentum_and_biased_variance(case, same, momentum):
    c = case()
    bn = layer(c, momentum=momentum)
    for scale in (1.0, -2.0):
        bn(scale * c.x, training=True)
        _, saved = batchnorm.forward_train(scale * c.x, layout="NLC")
        batchnorm.update_running(c.mean, c.var, saved, weight_of_old=momentum, unbiased=False)
    same(c.mean, array(bn.moving_mean))
    same(c.var, array(bn.moving_variance))


def test_inference(case, same):
    c = case()
    expected = array(layer(c)(c.x, training=False))
    same(batchnorm.forward_infer(c.x, c.mean, c.var, c.gamma, c.beta, eps=EPS, layout="NLC"), expected)


@pytest.mark.parametrize("options", [{"center": False}, {"scale": False}, {"center": False, "scale": False}])
def test_center_and_scale(case, same, options):
    c = case()
    gamma = c.gamma if options.get("scale", True) else None
    beta = c.beta if options.get("center", True) else None
    expected = array(layer(c, **options)(c.x, training=True))
    same(batchnorm.forward_train(c.x, gamma, beta, eps=EPS, layout="NLC")[0], expected)


@pytest.mark.parametrize(
    "layout, shape, axis",
    [
        ("NC", (8, 3), -1),
        ("NLC", (4, 5, 3), -1),
        ("NHWC", (4, 5, 6, 3), -1),
        ("NDHWC", (2, 4, 5, 6, 3), -1),
        ("NCHW", (4, 3, 5, 6), 1),
    ],
)
def test_axis(case, same, layout, shape, axis):
    c = case(shape, axis)
    expected = array(layer(c)(c.x, training=True))
    same(batchnorm.forward_train(c.x, c.gamma, c.beta, eps=EPS, layout=layout)[0], expected)


def test_trainable_false(case, same):
    """The gradient is that of docs/variants.md, which tests/variants compares with `freeze`."""
    c = case()
    bn = layer(c)
    bn.trainable = False
    x = torch.tensor(c.x, requires_grad=True)
    y = bn(x, training=True)
    y.backward(torch.tensor(c.dy))
    same(array(bn.moving_mean), c.mean)
    same(batchnorm.forward_infer(c.x, c.mean, c.var, c.gamma, c.beta, eps=EPS, layout="NLC"), array(y))
    same(c.dy * c.gamma / np.sqrt(c.var + EPS), array(x.grad))


def test_mask(case, same):
    """Positions that count have the values of a batch of them alone; `with_mask` is compared with that in tests/variants."""
    c = case()
    mask = np.arange(5) < np.array([[5], [3], [1], [4]])
    y = array(layer(c)(c.x, training=True, mask=mask))
    expected, saved = batchnorm.forward_train(c.x[mask], c.gamma, c.beta, eps=EPS)
    same(y[mask], expected)
    # Elsewhere Keras normalizes too, where the crate writes zeros.
    same(y[~mask], (c.x[~mask] - saved.mean) * saved.inv_std * c.gamma + c.beta)


def test_renorm(case, same):
    """r and d of docs/variants.md, which tests/variants compares with `renormalize`, without the limits."""
    c = case()
    bn = keras.layers.BatchNormalization(renorm=True)
    bn.build(c.x.shape)
    population = {"renorm_mean": c.mean, "renorm_stddev": np.sqrt(c.var + EPS)}
    for weight in bn.weights:
        if weight.name in population:
            weight.assign(population[weight.name])
    y = array(bn(c.x, training=True))
    xhat, saved = batchnorm.forward_train(c.x, eps=EPS, layout="NLC")
    std, std_of = np.sqrt(saved.var + EPS), population["renorm_stddev"]
    same(xhat * (std / std_of) + (saved.mean - c.mean) / std_of, y)
    # What moves is the standard deviation, not the variance; it began at one.
    same(array(bn.moving_stddev), 0.99 + 0.01 * std)


@pytest.mark.parametrize("name, digits", [("bfloat16", 8), ("float16", 11)])
def test_mixed_precision(case, same, name, digits):
    numpy_type = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    c = case()
    bn = layer(c, dtype=f"mixed_{name}")
    x = c.x.astype(numpy_type)
    y = bn(torch.tensor(x.astype(np.float32)).to(getattr(torch, name)), training=True)
    assert y.dtype == getattr(torch, name)
    assert {weight.dtype for weight in bn.weights} == {"float32"}
    got, _ = batchnorm.forward_train(x, c.gamma, c.beta, eps=EPS, layout="NLC")
    # An ulp: both round once, from values that differ in the last bits of float32.
    same(got.astype(np.float64), array(y.double()), 2.0 ** (1 - digits))


def test_float64(case, same):
    """A layer of float64 computes in float32, and says float64."""
    c = case()
    y = array(layer(c, dtype="float64")(c.x.astype(np.float64), training=True))
    exact = batchnorm.forward_train(c.x.astype(np.float64), c.gamma, c.beta, eps=EPS, layout="NLC")[0]
    assert y.dtype == exact.dtype == np.float64
    same(y, exact)
    assert np.max(np.abs(y - exact)) > 1e-9


def test_one_value(case, same):
    c = case((1, 3))
    bn = layer(c)
    same(array(bn(c.x, training=True)), [c.beta])
    y, saved = batchnorm.forward_train(c.x, c.gamma, c.beta, eps=EPS)
    same(y, [c.beta])
    batchnorm.update_running(c.mean, c.var, saved, weight_of_old=0.99, unbiased=False)
    same(c.var, array(bn.moving_variance))


def test_synchronized_wants_tensorflow():
    with pytest.raises(ValueError, match="only supported with the TensorFlow backend"):
        keras.layers.BatchNormalization(synchronized=True)
