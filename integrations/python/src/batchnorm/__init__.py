"""Batch Normalization (Ioffe & Szegedy 2015) of numpy arrays on the CPU.

>>> import numpy as np, batchnorm
>>> x = np.random.default_rng(0).normal(size=(8, 3, 5, 5)).astype(np.float32)
>>> gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)
>>> y, saved = batchnorm.forward_train(x, gamma, beta, eps=1e-5)
>>> dx, dgamma, dbeta = batchnorm.backward(x, y, saved, gamma, beta)
>>> mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
>>> batchnorm.update_running(mean, var, saved, weight_of_new=0.1, unbiased=True)
>>> y = batchnorm.forward_infer(x, mean, var, gamma, beta, eps=1e-5)

Arrays are float32, float64, float16 or bfloat16 (of ml_dtypes). Parameters and statistics are float64 for float64, and float32
for all others. What numpy.asarray takes does for an input, such as an object with the buffer protocol.

``layout`` names the dimensions, by default "NC", "NCL", "NCHW" or "NCDHW" by their number; "NLC", "NHWC" and "NDHWC" are the
others. Memory may be in the order of the layout, or with the channels moved to its other end: an "NCHW" array that lies
channels last, as ``np.moveaxis(nhwc, -1, 1)`` does, is used where it lies, and the output then lies so too. Arrays that lie
otherwise are refused; ``np.ascontiguousarray`` makes a copy that is not.

The bits of the results depend on the shape, the order of memory and the values, never on threads or the CPU. The GIL is given
up during a pass. What does not fit raises a ValueError or a TypeError, and then no output was touched.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from ctypes import byref, c_size_t, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._native import CONSTANTS, check, lib

__all__ = ["Gradients", "Saved", "backward", "forward_infer", "forward_train", "update_running", "__version__"]
__version__: str = lib.bn_version().decode()

Array = NDArray[Any]

_DTYPES = {
    "float32": CONSTANTS["BN_DTYPE_F32"],
    "float64": CONSTANTS["BN_DTYPE_F64"],
    "bfloat16": CONSTANTS["BN_DTYPE_BF16"],
    "float16": CONSTANTS["BN_DTYPE_F16"],
}
_ACTIVATIONS = {
    None: CONSTANTS["BN_ACTIVATION_NONE"],
    "relu": CONSTANTS["BN_ACTIVATION_RELU"],
    "leaky_relu": CONSTANTS["BN_ACTIVATION_LEAKY_RELU"],
}
_FIRST, _LAST = CONSTANTS["BN_LAYOUT_CHANNELS_FIRST"], CONSTANTS["BN_LAYOUT_CHANNELS_LAST"]
# The axis to which each order of memory moves the channels.
_AXES = {_FIRST: 1, _LAST: -1}
_LAYOUTS = ("NC", "NCL", "NCHW", "NCDHW", "NLC", "NHWC", "NDHWC")


@dataclass(frozen=True)
class _Options:
    """What a plan is told beside the shape."""

    eps: float
    activation: str | None
    slope: float
    threads: int


class _Plan:
    """A plan of the C library, shared by all calls with arrays of one shape."""

    def __init__(self, dtype: int, order: int, shape: tuple[int, ...], options: _Options, accumulate: bool) -> None:
        batch, channels, *spatial = shape if order == _FIRST else (shape[0], shape[-1], *shape[1:-1])
        handle = c_void_p()
        sizes = (c_size_t * len(spatial))(*spatial)
        check(lib.bn_plan_new(dtype, order, batch, channels, sizes, len(spatial), options.eps, byref(handle)))
        weakref.finalize(self, lib.bn_plan_free, handle)
        self.handle = handle
        if options.threads < 0:
            raise ValueError(f"expected 0 or more threads, got {options.threads}")
        if options.activation not in _ACTIVATIONS:
            raise ValueError(f"expected an activation of None, 'relu' or 'leaky_relu', got {options.activation!r}")
        check(lib.bn_plan_set_activation(handle, _ACTIVATIONS[options.activation], options.slope))
        check(lib.bn_plan_set_threads(handle, 1 if _forked else options.threads))
        check(lib.bn_plan_set_accumulation(handle, accumulate))


_plan = lru_cache(maxsize=64)(_Plan)
_forked = False


def _after_fork() -> None:
    # The child has none of the threads of the pool, and would wait for them for ever.
    global _forked
    _forked = True
    _plan.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Saved:
    """The statistics of a batch, and the options of the forward pass that took them: :func:`backward` wants both."""

    def __init__(
        self, plan: _Plan, dtype: np.dtype[Any], axis: int, order: int, channels: int, options: _Options
    ) -> None:
        handle = c_void_p()
        check(lib.bn_saved_new(plan.handle, byref(handle)))
        weakref.finalize(self, lib.bn_saved_free, handle)
        self._handle, self._dtype, self._axis, self._order = handle, dtype, axis, order
        self._channels, self._options = channels, options

    def _read(self, statistic: str) -> Array:
        to = np.empty(self._channels, _parameters(self._dtype))
        check(lib.bn_saved_read(self._handle, CONSTANTS[f"BN_STATISTIC_{statistic}"], *_pointer(to)))
        return to

    @property
    def count(self) -> int:
        """The number of values per channel."""
        return int(lib.bn_saved_count(self._handle))

    @property
    def mean(self) -> Array:
        """The mean of each channel."""
        return self._read("MEAN")

    @property
    def residue(self) -> Array:
        """What each mean has beyond its rounded value."""
        return self._read("RESIDUE")

    @property
    def var(self) -> Array:
        """The biased variance of each channel."""
        return self._read("VAR")

    @property
    def inv_std(self) -> Array:
        """``1 / sqrt(var + eps)`` of each channel, and 0 where that divides by 0."""
        return self._read("INV_STD")

    def __repr__(self) -> str:
        return f"Saved({self._channels} channels, {self.count} values each, {self._dtype})"


class Gradients(NamedTuple):
    """What :func:`backward` gives: ``None`` for what was not wanted."""

    dx: Array | None
    dgamma: Array | None
    dbeta: Array | None


def _parameters(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    return np.float64 if dtype == np.float64 else np.float32


def _pointer(array: Array | None) -> tuple[int | None, int]:
    return (None, 0) if array is None else (array.ctypes.data, array.size)


def _dtype_of(what: str, array: Array) -> int:
    if array.dtype.name not in _DTYPES or not array.dtype.isnative:
        raise TypeError(f"`{what}` must be one of {', '.join(_DTYPES)}, got {array.dtype}")
    return _DTYPES[array.dtype.name]


def _channel_axis(layout: str | None, ndim: int) -> int:
    if layout is None:
        if not 2 <= ndim <= 5:
            raise ValueError(f"expected an array of 2 to 5 dimensions, got {ndim}")
        return 1
    if layout not in _LAYOUTS:
        raise ValueError(f"expected a layout of {', '.join(_LAYOUTS)}, got {layout!r}")
    if len(layout) != ndim:
        raise ValueError(f"the layout {layout} has {len(layout)} dimensions, the array {ndim}")
    return 1 if layout[1] == "C" else ndim - 1


def _in_memory(what: str, array: Array, axis: int, orders: Iterable[int]) -> tuple[Array, int]:
    """The array with its axes in the order of memory, the first that fits, and that order."""
    for order in orders:
        if (view := np.moveaxis(array, axis, _AXES[order])).flags.c_contiguous:
            return view, order
    raise ValueError(
        f"`{what}` must lie dense, as x does if there is an x (numpy.ascontiguousarray makes a copy that does)"
    )


def _input(x: ArrayLike, layout: str | None) -> tuple[Array, int, int]:
    """An input in the order of memory, its axis of channels as given, and the order."""
    array = np.asarray(x)
    _dtype_of("x", array)
    axis = _channel_axis(layout, array.ndim)
    return *_in_memory("x", array, axis, (_FIRST, _LAST)), axis


def _alike(what: str, given: ArrayLike, x: Array, axis: int, order: int) -> Array:
    """Another array of the type, the shape and the order of ``x``, in the order of memory."""
    array = np.asarray(given)
    expected = np.moveaxis(x, _AXES[order], axis).shape
    if array.dtype != x.dtype:
        raise TypeError(f"`{what}` must be {x.dtype} as x is, got {array.dtype}")
    if array.shape != expected:
        raise ValueError(f"`{what}` must have the shape {expected} of x, got {array.shape}")
    return _in_memory(what, array, axis, (order,))[0]


def _output(out: Array | None, x: Array, axis: int, order: int) -> Array:
    """Where a result goes, in the order of memory."""
    if out is None:
        return np.empty(x.shape, x.dtype)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"`out` must be a numpy array, got {type(out).__name__}")
    if not out.flags.writeable:
        raise ValueError("`out` is read-only")
    return _alike("out", out, x, axis, order)


def _result(memory: Array, out: Array | None, axis: int, order: int) -> Array:
    """What :func:`_output` gave, with its axes as the caller has them."""
    return np.moveaxis(memory, _AXES[order], axis) if out is None else out


def _channels(what: str, values: ArrayLike | None, dtype: np.dtype[Any]) -> Array | None:
    """One value per channel, converted if need be."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"`{what}` must have one dimension, got {array.ndim}")
    return np.ascontiguousarray(array.astype(_parameters(dtype), casting="same_kind", copy=False))


def forward_train(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    layout: str | None = None,
    activation: str | None = None,
    slope: float = 0.01,
    out: Array | None = None,
    threads: int = 0,
) -> tuple[Array, Saved]:
    """``act(gamma * (x - mean) / sqrt(var + eps) + beta)`` with the mean and the biased variance of the batch, and these.

    gamma and beta default to ones and zeros; they are converted to the type of parameters. ``activation`` is "relu" or
    "leaky_relu", the latter with a ``slope``. ``out`` takes the result; it may be ``x``, which is then computed in place.
    ``threads`` of 0 leaves their number to the library.
    """
    x, order, axis = _input(x, layout)
    options = _Options(float(eps), activation, float(slope), threads)
    plan = _plan(_dtype_of("x", x), order, x.shape, options, False)
    saved = Saved(plan, x.dtype, axis, order, x.shape[_AXES[order]], options)
    y = _output(out, x, axis, order)
    gamma, beta = _channels("gamma", gamma, x.dtype), _channels("beta", beta, x.dtype)
    check(
        lib.bn_forward_train(plan.handle, *_pointer(x), *_pointer(gamma), *_pointer(beta), *_pointer(y), saved._handle)
    )
    return _result(y, out, axis, order), saved


def forward_infer(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    layout: str | None = None,
    activation: str | None = None,
    slope: float = 0.01,
    out: Array | None = None,
    threads: int = 0,
) -> Array:
    """``act(gamma * (x - mean) / sqrt(var + eps) + beta)`` with the mean and the variance of the population.

    Arguments are those of :func:`forward_train`.
    """
    x, order, axis = _input(x, layout)
    plan = _plan(_dtype_of("x", x), order, x.shape, _Options(float(eps), activation, float(slope), threads), False)
    y = _output(out, x, axis, order)
    lines = [_channels(*line, x.dtype) for line in (("gamma", gamma), ("beta", beta), ("mean", mean), ("var", var))]
    check(lib.bn_forward_infer(plan.handle, *_pointer(x), *(p for line in lines for p in _pointer(line)), *_pointer(y)))
    return _result(y, out, axis, order)


def backward(
    x: ArrayLike,
    dy: ArrayLike,
    saved: Saved,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    want: Iterable[str] = ("dx", "dgamma", "dbeta"),
    out: Array | None = None,
    add_to: tuple[Array, Array] | None = None,
) -> Gradients:
    """The gradients, of which ``want`` names any.

    ``x``, ``gamma``, ``beta`` and ``saved`` are those of :func:`forward_train`; beta counts behind an activation. ``dy`` must
    lie in memory as ``x`` does. ``out`` takes dx; it may be ``dy``. ``add_to`` takes two arrays to which dgamma and dbeta are
    added, so that the micro-batches of one step share them.
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"`saved` must be what forward_train gave, got {type(saved).__name__}")
    want = {want} if isinstance(want, str) else set(want)
    if unknown := want.difference(Gradients._fields):
        raise ValueError(f"expected dx, dgamma and dbeta in `want`, got {', '.join(sorted(map(repr, unknown)))}")
    given, axis, order = np.asarray(x), saved._axis, saved._order
    dtype = _dtype_of("x", given)
    if given.dtype != saved._dtype:
        raise TypeError(f"`x` must be {saved._dtype} as in the forward pass, got {given.dtype}")
    if not 2 <= given.ndim <= 5 or axis >= given.ndim:
        raise ValueError(f"`x` must have the dimensions of the forward pass, got {given.ndim}")
    if given.shape[axis] != saved._channels:
        raise ValueError(f"`x` must have the {saved._channels} channels of the forward pass, got {given.shape[axis]}")
    x = _in_memory("x", given, axis, (order,))[0]
    dy = _alike("dy", dy, x, axis, order)
    dx = _output(out, x, axis, order) if "dx" in want else None
    if add_to is None:
        dgamma, dbeta = (
            np.empty(saved._channels, _parameters(x.dtype)) if name in want else None for name in ("dgamma", "dbeta")
        )
    else:
        dgamma, dbeta = (
            _in_place(what, array, x.dtype) for what, array in zip(("dgamma", "dbeta"), add_to, strict=True)
        )
    plan = _plan(dtype, order, x.shape, saved._options, add_to is not None)
    gamma, beta = _channels("gamma", gamma, x.dtype), _channels("beta", beta, x.dtype)
    arrays = (gamma, beta, dx, dgamma, dbeta)
    pointers = (p for array in arrays for p in _pointer(array))
    check(lib.bn_backward(plan.handle, *_pointer(x), *_pointer(dy), saved._handle, *pointers))
    return Gradients(None if dx is None else _result(dx, out, axis, order), dgamma, dbeta)


def _in_place(what: str, array: Array, dtype: np.dtype[Any]) -> Array:
    """One value per channel that is changed where it lies."""
    if not isinstance(array, np.ndarray) or array.dtype != _parameters(dtype):
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(
            f"`{what}` is changed in place and must be a numpy array of {_parameters(dtype).__name__}, got {got}"
        )
    if array.ndim != 1 or not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(f"`{what}` is changed in place and must be writeable, dense and of one dimension")
    return array


def update_running(
    mean: Array,
    var: Array,
    saved: Saved,
    *,
    unbiased: bool,
    weight_of_new: float | None = None,
    weight_of_old: float | None = None,
    batches: int | None = None,
) -> None:
    """Moves running statistics, in place, towards those of a batch.

    Frameworks differ, so nothing has a default: one of ``weight_of_new`` (PyTorch's momentum, 0.1 there), ``weight_of_old``
    (Keras's and ONNX's) and ``batches`` (the number of batches so far, for the plain average: PyTorch's momentum=None) is
    given, and ``unbiased`` says whether the variance is divided by one less than the number of values (PyTorch) or not
    (Keras, ONNX).
    """
    choices = [
        (CONSTANTS["BN_MOMENTUM_WEIGHT_OF_NEW"], weight_of_new, 0),
        (CONSTANTS["BN_MOMENTUM_WEIGHT_OF_OLD"], weight_of_old, 0),
        (CONSTANTS["BN_MOMENTUM_CUMULATIVE"], None if batches is None else 0.0, batches),
    ]
    given = [choice for choice in choices if choice[1] is not None]
    if len(given) != 1:
        raise TypeError("expected one of weight_of_new, weight_of_old and batches")
    if batches is not None and batches < 0:
        raise ValueError(f"`batches` must be at least 0, got {batches}")
    momentum, weight, before = given[0]
    variance = CONSTANTS["BN_VARIANCE_UNBIASED" if unbiased else "BN_VARIANCE_BIASED"]
    pointers = (
        p for what, array in (("mean", mean), ("var", var)) for p in _pointer(_in_place(what, array, saved._dtype))
    )
    check(lib.bn_running_update(saved._handle, momentum, weight, variance, before, *pointers))
