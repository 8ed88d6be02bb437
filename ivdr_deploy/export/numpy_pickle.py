"""Reads a pickle of nested dicts of numpy arrays without running anything that stands in it.

Not even numpy's own functions are called: the three names with which numpy pickles an array are answered by classes of
this module, which note shape, type and bytes. Every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.export.pickle_scan import require_bounded

_MAX_DEPTH = 20
_LONGEST = 1 << 62
"""That an axis of an array can be: a product of longer numbers could take minutes."""


class _DType:
    """Stands for ``numpy.dtype``."""

    __slots__ = ("byte_order", "code")

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.byte_order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]


class _NdArray:
    """Stands for ``numpy.ndarray``, which is only named in such a file."""

    __slots__ = ()


class _Array:
    """Stands for ``_reconstruct``: an array that is about to be filled."""

    __slots__ = ("state",)

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def to_numpy(self, name: str) -> np.ndarray:
        """Return the array; raises CheckpointError where it is not one of float32."""
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _DType) or (dtype.code, dtype.byte_order) not in {("f4", "<"), ("f4", "=")}:
            raise CheckpointError(
                f"the array {quoted(name)} is not of little-endian float32",
                hint="give the weights as published",
            )
        axes = isinstance(shape, tuple) and all(0 <= size < _LONGEST for size in shape)
        if not axes or 4 * math.prod(shape) != len(content):
            raise CheckpointError(f"the array {quoted(name)} does not have the bytes of its shape")
        return np.frombuffer(content, "<f4").reshape(shape, order="F" if fortran else "C")


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _NdArray,
    ("numpy", "dtype"): _DType,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"the file names {quoted(f'{module}.{name}')}, which reading it would run",
                hint="only arrays of numpy are read from such a file; do not trust it, and load it nowhere else",
            )
        return _ALLOWED[module, name]


def read_arrays(content: bytes, *, where: str) -> dict[tuple[str, ...], np.ndarray]:
    """Read the arrays of a pickle.

    Args:
        content: The file.
        where: Its name, for error messages.

    Returns:
        Read-only float32 arrays by the path of dict keys that leads to them.

    Raises:
        CheckpointError: if it is no such pickle, cut short or damaged, or names anything but a numpy array.
    """
    try:
        require_bounded(io.BytesIO(content))
        root = _Reader(io.BytesIO(content)).load()
        if not isinstance(root, dict):  # an array alone has no name
            raise CheckpointError(f"expected nested dicts of arrays, found {_kind(root)} alone")
        arrays = dict(_flatten(root, (), set()))
        if sum(array.nbytes for array in arrays.values()) > len(content):
            raise CheckpointError("its arrays share their bytes")
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint) from error
    except Exception as error:  # unpickling raises what it likes on damaged files
        raise CheckpointError(
            f"{where} is not a readable pickle of numpy arrays ({type(error).__name__}: {quoted(str(error))})",
            hint="it may be cut short: fetch it again",
        ) from error
    if not arrays:
        raise CheckpointError(f"{where} holds no arrays")
    return arrays


def _flatten(
    value: object, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yield every array; a dict that stands in two places is refused, or a small file could take for ever."""
    name = "/".join(path)
    if isinstance(value, _Array):
        yield path, value.to_numpy(name)
    elif isinstance(value, dict) and len(path) < _MAX_DEPTH and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items():
            yield from _flatten(inner, (*path, str(key)), seen)
    else:
        raise CheckpointError(f"expected nested dicts of arrays, found {_kind(value)} at {quoted(name)}")


def _kind(value: object) -> str:
    return "an array" if isinstance(value, _Array) else type(value).__name__
