"""The package against formulas in float64, and bit for bit against itself: threads, layouts, in place. And what it refuses."""

import ctypes
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import batchnorm
import numpy as np
import pytest
from batchnorm import _native

try:
    import ml_dtypes

    BFLOAT16 = [np.dtype(ml_dtypes.bfloat16)]
except ImportError:
    BFLOAT16 = []

# Element types and how far a result may be from the exact one, in units of the larger of 1 and the result: half an ulp, and some
# for the arithmetic of float32.
TYPES = [(np.dtype(np.float64), 1e-12), (np.dtype(np.float32), 2e-6), (np.dtype(np.float16), 2.0**-11 + 2e-6)]
TYPES += [(dtype, 2.0**-8 + 2e-6) for dtype in BFLOAT16]
SHAPES = {"NC": (40, 3), "NCL": (6, 3, 7), "NLC": (6, 7, 3), "NCHW": (5, 3, 4, 6), "NHWC": (5, 4, 6, 3)}
SHAPES |= {"NCDHW": (2, 3, 4, 3, 5), "NDHWC": (2, 4, 3, 5, 3)}
EPS = 1e-3
GAMMA, BETA = np.array([1.5, -0.5, 2.0]), np.array([0.25, 0.0, -1.0])


def values(shape, dtype, seed):
    return np.random.default_rng(seed).normal(0.5, 2.0, shape).astype(dtype)


def parameters(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def oracle(x, dy, axis, activation=None, slope=0.01):
    """y, mean, var, dx, dgamma and dbeta of algorithm 1 in float64."""
    x, dy = np.moveaxis(x.astype(np.float64), axis, -1), np.moveaxis(dy.astype(np.float64), axis, -1)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    xhat = (x - mean) / np.sqrt(var + EPS)
    y = GAMMA * xhat + BETA
    if activation:
        bent = 0.0 if activation == "relu" else slope
        dy = np.where(y > 0, dy, bent * dy)
        y = np.where(y > 0, y, bent * y)
    dgamma, dbeta = (dy * xhat).sum(axes), dy.sum(axes)
    count = x.size / 3
    dx = GAMMA / np.sqrt(var + EPS) * (dy - dbeta / count - xhat * dgamma / count)
    return np.moveaxis(y, -1, axis), mean, var, np.moveaxis(dx, -1, axis), dgamma, dbeta


def assert_close(got, expected, tolerance):
    assert got.shape == expected.shape
    difference = np.abs(got.astype(np.float64) - expected) / np.maximum(1.0, np.abs(expected))
    assert difference.max() <= tolerance, difference.max()


def assert_same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype,tolerance", TYPES, ids=lambda value: str(value))
@pytest.mark.parametrize("layout", SHAPES)
def test_numbers(layout, dtype, tolerance):
    shape, axis = SHAPES[layout], layout.index("C")
    x, dy = values(shape, dtype, 1), values(shape, dtype, 2)
    for activation in (None, "leaky_relu"):
        options = dict(eps=EPS, layout=layout, activation=activation, slope=0.25)
        y, saved = batchnorm.forward_train(x, GAMMA, BETA, **options)
        gradients = batchnorm.backward(x, dy, saved, GAMMA, BETA)
        expected = oracle(x, dy, axis, activation, 0.25)
        assert y.dtype == gradients.dx.dtype == dtype
        sums = 1e-12 if dtype == np.float64 else 1e-5
        for got, exact, bound in zip(
            (y, saved.mean, saved.var, *gradients),
            expected,
            (tolerance, sums, sums, tolerance, sums, sums),
            strict=True,
        ):
            assert_close(got, exact, bound)
    assert saved.count == x.size // 3
    assert_close(saved.inv_std, 1 / np.sqrt(expected[2] + EPS), sums)
    y = batchnorm.forward_infer(x, expected[1], expected[2], GAMMA, BETA, eps=EPS, layout=layout)
    assert_close(y, oracle(x, dy, axis)[0], tolerance)


@pytest.mark.parametrize("dtype,_", TYPES, ids=lambda value: str(value))
def test_order_of_memory(dtype, _):
    """Channels first that lie channels last, and the other way round: the bits, and the strides, of what they lie as."""
    nhwc, dy = values((5, 4, 6, 3), dtype, 1), values((5, 4, 6, 3), dtype, 2)
    y, saved = batchnorm.forward_train(nhwc, GAMMA, BETA, layout="NHWC")
    dx = batchnorm.backward(nhwc, dy, saved, GAMMA, BETA).dx
    seen, seen_dy = np.moveaxis(nhwc, -1, 1), np.moveaxis(dy, -1, 1)
    y2, saved2 = batchnorm.forward_train(seen, GAMMA, BETA)
    dx2 = batchnorm.backward(seen, seen_dy, saved2, GAMMA, BETA).dx
    assert y2.shape == dx2.shape == (5, 3, 4, 6) and y2.strides == dx2.strides == seen.strides
    assert_same(np.moveaxis(y2, 1, -1), y)
    assert_same(np.moveaxis(dx2, 1, -1), dx)
    nchw = np.ascontiguousarray(seen)
    y3, _ = batchnorm.forward_train(np.moveaxis(nchw, 1, -1), GAMMA, BETA, layout="NHWC")
    assert_same(np.moveaxis(y3, -1, 1), batchnorm.forward_train(nchw, GAMMA, BETA)[0])
    with pytest.raises(ValueError, match="`dy` must lie dense, as x does"):
        batchnorm.backward(seen, np.ascontiguousarray(seen_dy), saved2, GAMMA, BETA)
    for other in (nchw[:, :, ::2], nchw[::-1], np.swapaxes(nchw, 2, 3), np.broadcast_to(nchw[:1], nchw.shape)):
        with pytest.raises(ValueError, match="`x` must lie dense"):
            batchnorm.forward_train(other)


def test_out_and_in_place():
    x, dy = values((5, 3, 4, 6), np.float32, 1), values((5, 3, 4, 6), np.float32, 2)
    y, saved = batchnorm.forward_train(x, GAMMA, BETA)
    gradients = batchnorm.backward(x, dy, saved, GAMMA, BETA)
    out = np.empty_like(x)
    assert batchnorm.forward_train(x, GAMMA, BETA, out=out)[0] is out
    assert_same(out, y)
    over = x.copy()
    batchnorm.forward_train(over, GAMMA, BETA, out=over)
    assert_same(over, y)
    over = dy.copy()
    assert batchnorm.backward(x, over, saved, GAMMA, BETA, out=over).dx is over
    assert_same(over, gradients.dx)
    inferred = batchnorm.forward_infer(x, saved.mean, saved.var)
    assert batchnorm.forward_infer(x, saved.mean, saved.var, out=out) is out
    assert_same(out, inferred)
    for name in gradients._fields:
        alone = batchnorm.backward(x, dy, saved, GAMMA, BETA, want=[name])
        assert [value is None for value in alone] == [field != name for field in gradients._fields]
        assert_same(getattr(alone, name), getattr(gradients, name))
    sums = gradients.dgamma.copy(), np.zeros(3, np.float32)
    batchnorm.backward(x, dy, saved, GAMMA, BETA, want="dx", add_to=sums)
    assert_same(sums[0], 2 * gradients.dgamma)
    assert_same(sums[1], gradients.dbeta)


def test_inputs_of_other_kinds():
    """Anything with the buffer protocol, lists of parameters, an empty batch, and arrays that may not be written."""
    x = values((40, 3), np.float64, 1)
    y, saved = batchnorm.forward_train(x, GAMMA, BETA)
    buffer = memoryview(x.tobytes()).cast("d", x.shape)
    assert_same(batchnorm.forward_train(buffer, list(GAMMA), tuple(BETA))[0], y)
    x.flags.writeable = False
    assert_same(batchnorm.forward_train(x, GAMMA, BETA)[0], y)
    assert batchnorm.forward_infer(np.empty((0, 3, 2)), saved.mean, saved.var).shape == (0, 3, 2)
    assert repr(saved) == "Saved(3 channels, 40 values each, float64)"


def test_running_statistics():
    x = values((40, 3), np.float32, 1)
    _, saved = batchnorm.forward_train(x)
    batch_mean, biased = x.astype(np.float64).mean(0), x.astype(np.float64).var(0)
    fresh = lambda: (np.zeros(3, np.float32), np.ones(3, np.float32))  # noqa: E731
    cases = [
        (dict(weight_of_new=0.1, unbiased=True), 0.1, 40 / 39),
        (dict(weight_of_old=0.75, unbiased=False), 0.25, 1.0),
        (dict(batches=0, unbiased=False), 1.0, 1.0),
        (dict(batches=3, unbiased=True), 0.25, 40 / 39),
    ]
    for convention, take, correction in cases:
        mean, var = fresh()
        assert batchnorm.update_running(mean, var, saved, **convention) is None
        assert_close(mean, take * batch_mean, 1e-6)
        assert_close(var, (1 - take) + take * correction * biased, 1e-6)
    mean, var = fresh()
    for wrong in ({}, dict(weight_of_new=0.1, batches=1)):
        with pytest.raises(TypeError, match="expected one of weight_of_new, weight_of_old and batches"):
            batchnorm.update_running(mean, var, saved, unbiased=True, **wrong)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        batchnorm.update_running(mean, var, saved, unbiased=True, weight_of_new=1.5)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        batchnorm.update_running(mean, var, saved, unbiased=True, batches=-1)
    with pytest.raises(TypeError, match="`mean` is changed in place and must be a numpy array of float32, got float64"):
        batchnorm.update_running(mean.astype(np.float64), var, saved, unbiased=True, batches=1)
    with pytest.raises(TypeError, match="got list"):
        batchnorm.update_running([0, 0, 0], var, saved, unbiased=True, batches=1)
    with pytest.raises(ValueError, match="writeable, dense"):
        batchnorm.update_running(mean, np.ones(6, np.float32)[::2], saved, unbiased=True, batches=1)
    with pytest.raises(ValueError, match="must hold 3 elements"):
        batchnorm.update_running(mean, var[:2], saved, unbiased=True, batches=1)
    assert (mean == 0).all() and (var == 1).all()


def test_what_is_refused():
    x = values((5, 3, 4, 6), np.float32, 1)
    _, saved = batchnorm.forward_train(x)
    out = np.full_like(x, 7)
    read_only = out[:]
    read_only.flags.writeable = False
    refused = [
        (
            TypeError,
            "`x` must be one of float32, float64, bfloat16, float16, got int64",
            lambda: batchnorm.forward_train([[1, 2]]),
        ),
        (TypeError, "got >f4", lambda: batchnorm.forward_train(x.astype(">f4"))),
        (ValueError, "2 to 5 dimensions, got 1", lambda: batchnorm.forward_train(x.ravel())),
        (ValueError, "expected a layout of NC", lambda: batchnorm.forward_train(x, layout="CHWN")),
        (ValueError, "the layout NLC has 3 dimensions, the array 4", lambda: batchnorm.forward_train(x, layout="NLC")),
        (
            ValueError,
            "`gamma` must hold 3 elements for this shape, got 2",
            lambda: batchnorm.forward_train(x, GAMMA[:2]),
        ),
        (ValueError, "`beta` must have one dimension, got 2", lambda: batchnorm.forward_train(x, None, BETA[None])),
        (TypeError, "Cannot cast", lambda: batchnorm.forward_train(x, GAMMA.astype(complex))),
        (ValueError, "eps must be finite and at least 0, got -1", lambda: batchnorm.forward_train(x, eps=-1)),
        (
            ValueError,
            "eps must be finite and at least 0, got NaN",
            lambda: batchnorm.forward_train(x, eps=float("nan")),
        ),
        (ValueError, "expected an activation", lambda: batchnorm.forward_train(x, activation="gelu")),
        (ValueError, "slope", lambda: batchnorm.forward_train(x, activation="leaky_relu", slope=-1)),
        (ValueError, "0 or more threads, got -2", lambda: batchnorm.forward_train(x, threads=-2)),
        (TypeError, "`out` must be a numpy array, got list", lambda: batchnorm.forward_train(x, out=[])),
        (
            TypeError,
            "`out` must be float32 as x is, got float64",
            lambda: batchnorm.forward_train(x, out=out.astype(float)),
        ),
        (ValueError, "`out` must have the shape", lambda: batchnorm.forward_train(x, out=out[:2])),
        (ValueError, "`out` is read-only", lambda: batchnorm.forward_train(x, out=read_only)),
        (
            ValueError,
            "`out` must lie dense",
            lambda: batchnorm.forward_train(x, out=np.moveaxis(np.moveaxis(out, 1, -1).copy(), -1, 1)),
        ),
        (
            ValueError,
            "shares memory with `x`",
            lambda: batchnorm.forward_train(out.ravel()[:-4].reshape(-1, 2), out=out.ravel()[4:].reshape(-1, 2)),
        ),
        (ValueError, "at least one value per channel", lambda: batchnorm.forward_train(x[:0])),
        (ValueError, "at least one channel", lambda: batchnorm.forward_train(x[:, :0])),
        (ValueError, "the variance of channel 1", lambda: batchnorm.forward_infer(x, BETA, [1, -1, 1], out=out)),
        (TypeError, "what forward_train gave, got tuple", lambda: batchnorm.backward(x, x, (1, 2))),
        (TypeError, "`dy` must be float32", lambda: batchnorm.backward(x, x.astype(float), saved)),
        (TypeError, "`x` must be float32 as in the forward", lambda: batchnorm.backward(x.astype(float), x, saved)),
        (ValueError, "this batch has 96", lambda: batchnorm.backward(x[:4], x[:4], saved, out=out[:4])),
        (
            ValueError,
            "the 3 channels of the forward pass, got 2",
            lambda: batchnorm.backward(x[:, :2].copy(), x[:, :2].copy(), saved),
        ),
        (ValueError, "`dy` must have the shape", lambda: batchnorm.backward(x, x[:4], saved)),
        (ValueError, "in `want`, got 'dz'", lambda: batchnorm.backward(x, x, saved, want="dz")),
        (TypeError, "`dgamma` is changed in place", lambda: batchnorm.backward(x, x, saved, add_to=(GAMMA, BETA))),
        (ValueError, "`dx` is written and shares memory with `x`", lambda: batchnorm.backward(out, x, saved, out=out)),
    ]
    for exception, message, call in refused:
        with pytest.raises(exception, match=message):
            call()
    assert (out == 7).all()


def large(seed):
    return values((16, 3, 200, 160), np.float32, seed)


def test_threads_have_the_same_bits():
    x, dy = large(1), large(2)
    y, saved = batchnorm.forward_train(x, GAMMA, BETA, threads=1)
    gradients = batchnorm.backward(x, dy, saved, GAMMA, BETA)
    for threads in (0, 2, 5):
        y2, saved2 = batchnorm.forward_train(x, GAMMA, BETA, threads=threads)
        assert_same(y2, y)
        for got, expected in zip(batchnorm.backward(x, dy, saved2, GAMMA, BETA), gradients, strict=True):
            assert_same(got, expected)
    results = [None] * 4

    def work(i):
        results[i] = batchnorm.forward_train(x, GAMMA, BETA)[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        assert_same(result, y)


def test_the_gil_is_given_up():
    assert isinstance(_native.lib, ctypes.CDLL) and not isinstance(_native.lib, ctypes.PyDLL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_can_go_on():
    """A fork has none of the pool's threads, and must not wait for them."""
    program = """
import os, signal, batchnorm, numpy as np
x = np.ones((16, 3, 200, 160), np.float32)
batchnorm.forward_train(x, threads=4)
child = os.fork()
if child == 0:
    signal.alarm(60)
    batchnorm.forward_train(x, threads=4)
    os._exit(0)
os._exit(0 if os.waitpid(child, 0)[1] == 0 else 1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_the_readme_runs():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    exec(readme.split("```python")[1].split("```")[0], {})


def test_declarations_are_those_of_the_header():
    """ctypes believes what it is told, so this reads the header."""
    header = Path(__file__).parents[2] / "c" / "include" / "batchnorm.h"
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
    types = {
        "int32_t": ctypes.c_int32,
        "uint32_t": ctypes.c_uint32,
        "uint64_t": ctypes.c_uint64,
        "size_t": ctypes.c_size_t,
    }
    types |= {"double": ctypes.c_double, "bool": ctypes.c_bool, "bn_status": ctypes.c_int32, "void": None}
    types |= {"const char *": ctypes.c_char_p, "const size_t *": ctypes.POINTER(ctypes.c_size_t)}

    def of(declared):
        declared = re.sub(r"\s*\w+$", "", declared.strip()) if declared.strip() not in types else declared.strip()
        declared = re.sub(r"\bstruct ", "", declared).strip()
        if declared in types:
            return types[declared]
        return ctypes.POINTER(ctypes.c_void_p) if declared.endswith("**") else ctypes.c_void_p

    found = re.findall(r"^([\w ]+?[ *]+)(bn_\w+)\(([^)]*)\);", text, flags=re.M)
    declared = {
        name: (of(result + "x"), [] if arguments.strip() == "void" else [of(a) for a in arguments.split(",")])
        for result, name, arguments in found
    }
    for name, prototype in _native.PROTOTYPES.items():
        assert declared[name] == prototype, name
    constants = {
        name: int(value)
        for name, value in re.findall(r"^\s*(?:#define )?(BN_[A-Z0-9_]+) =? ?(\d+),?$", text, flags=re.M)
    }
    for name, value in _native.CONSTANTS.items():
        assert constants[name] == value, name


def test_out_is_not_given_back_for_a_gradient_that_was_not_wanted():
    x = np.ones((4, 3, 2), np.float32)
    _, saved = batchnorm.forward_train(x)
    assert batchnorm.backward(x, x, saved, want="dbeta", out=np.empty_like(x)).dx is None
