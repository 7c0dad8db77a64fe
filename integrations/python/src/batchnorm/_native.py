"""The C library: its functions as ctypes knows them, and its refusals as exceptions."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

# Where each function wants an array it takes a pointer and a number of elements.
_ARRAY = [c_void_p, c_size_t]
_NEW = POINTER(c_void_p)

#: What is used of batchnorm.h: the result and the arguments of each function. The tests compare it with the header.
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "bn_version": (c_char_p, []),
    "bn_abi_version": (c_uint32, []),
    "bn_last_error": (c_char_p, []),
    "bn_plan_new": (c_int32, [c_int32, c_int32, c_size_t, c_size_t, POINTER(c_size_t), c_size_t, c_double, _NEW]),
    "bn_plan_free": (None, [c_void_p]),
    "bn_plan_set_threads": (c_int32, [c_void_p, c_size_t]),
    "bn_plan_set_activation": (c_int32, [c_void_p, c_int32, c_double]),
    "bn_plan_set_accumulation": (c_int32, [c_void_p, c_bool]),
    "bn_saved_new": (c_int32, [c_void_p, _NEW]),
    "bn_saved_free": (None, [c_void_p]),
    "bn_saved_count": (c_uint64, [c_void_p]),
    "bn_saved_read": (c_int32, [c_void_p, c_int32, *_ARRAY]),
    "bn_running_update": (c_int32, [c_void_p, c_int32, c_double, c_int32, c_uint64, *_ARRAY, *_ARRAY]),
    "bn_forward_train": (c_int32, [c_void_p, *_ARRAY, *_ARRAY, *_ARRAY, *_ARRAY, c_void_p]),
    "bn_forward_infer": (c_int32, [c_void_p, *_ARRAY, *_ARRAY, *_ARRAY, *_ARRAY, *_ARRAY, *_ARRAY]),
    "bn_backward": (c_int32, [c_void_p, *_ARRAY, *_ARRAY, c_void_p, *_ARRAY, *_ARRAY, *_ARRAY, *_ARRAY, *_ARRAY]),
}

#: Values of the header's enumerations, by their names there.
CONSTANTS = {
    "BN_ABI_VERSION": 1,
    "BN_STATUS_OK": 0,
    "BN_STATUS_ALIGNMENT": 3,
    "BN_STATUS_DTYPE": 6,
    "BN_STATUS_MEMORY": 19,
    "BN_STATUS_PANIC": 21,
    "BN_DTYPE_F32": 0,
    "BN_DTYPE_F64": 1,
    "BN_DTYPE_BF16": 2,
    "BN_DTYPE_F16": 3,
    "BN_LAYOUT_CHANNELS_FIRST": 0,
    "BN_LAYOUT_CHANNELS_LAST": 1,
    "BN_ACTIVATION_NONE": 0,
    "BN_ACTIVATION_RELU": 1,
    "BN_ACTIVATION_LEAKY_RELU": 2,
    "BN_MOMENTUM_WEIGHT_OF_NEW": 0,
    "BN_MOMENTUM_WEIGHT_OF_OLD": 1,
    "BN_MOMENTUM_CUMULATIVE": 2,
    "BN_VARIANCE_BIASED": 0,
    "BN_VARIANCE_UNBIASED": 1,
    "BN_STATISTIC_MEAN": 0,
    "BN_STATISTIC_RESIDUE": 1,
    "BN_STATISTIC_VAR": 2,
    "BN_STATISTIC_INV_STD": 3,
}

_EXCEPTIONS: dict[int, type[Exception]] = {
    CONSTANTS["BN_STATUS_DTYPE"]: TypeError,
    CONSTANTS["BN_STATUS_MEMORY"]: MemoryError,
    CONSTANTS["BN_STATUS_PANIC"]: RuntimeError,
}


def _load() -> ctypes.CDLL:
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = next(Path(__file__).parent.glob(f"*batchnorm_c{suffix}"), None)
    if path is None:
        raise ImportError("the C library is not beside this file: install the package with `pip install .`")
    # CDLL, unlike PyDLL, gives up the GIL while a function runs.
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if (got := library.bn_abi_version()) != CONSTANTS["BN_ABI_VERSION"]:
        raise ImportError(f"{path} has version {got} of the binary interface, expected {CONSTANTS['BN_ABI_VERSION']}")
    return library


lib = _load()


def check(status: int) -> None:
    """Raises what a refusal is in Python: a ValueError unless another exception says it better."""
    if status != CONSTANTS["BN_STATUS_OK"]:
        raise _EXCEPTIONS.get(status, ValueError)(lib.bn_last_error().decode())
