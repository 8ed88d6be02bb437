"""Named tensors, as the Open Inference Protocol (KServe v2) carries them, between bytes, JSON and arrays."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import RequestError
from ivdr_deploy.serving.core.parsing import parse_base64

Datatype = Literal["BYTES", "UINT8", "INT32", "FP32", "FP64"]
"""The protocol's names of those that are used here."""

_DTYPES: dict[str, str] = {"UINT8": "u1", "INT32": "<i4", "FP32": "<f4", "FP64": "<f8"}
_LENGTH = struct.Struct("<I")
"""In front of each element of a BYTES tensor."""

_MOST_ELEMENTS = {"BYTES": 4096}
"""Each is a video, and no server takes as many at a time. Empty ones would cost nothing to send."""

_MOST_NUMBERS = 1 << 32
"""Of any other tensor: far more than a request can hold, and few enough to be written into a message."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    values: np.ndarray | Sequence[bytes]
    """An array of this shape; of BYTES its elements, row by row."""

    def raw(self) -> bytes:
        """Return the content as gRPC and the binary extension of HTTP carry it: little-endian, rows first."""
        if isinstance(self.values, np.ndarray):
            return np.ascontiguousarray(self.values, _DTYPES[self.datatype]).tobytes()
        return b"".join(part for value in self.values for part in (_LENGTH.pack(len(value)), value))

    def plain(self) -> list[Any]:
        """Return the content as JSON carries it: one flat list; an element of BYTES is text."""
        if isinstance(self.values, np.ndarray):
            flat: list[Any] = self.values.reshape(-1).tolist()
            # JSON has no NaN, which stands where an item failed.
            return [None if value != value else value for value in flat]
        return [value.decode("utf-8", "replace") for value in self.values]


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Tensor:
    """Read a tensor from its bytes; see ``Tensor.raw``. An array is a view of them.

    Raises:
        RequestError: if the datatype is none of ``Datatype``, or there are more or fewer bytes than the shape needs.
    """
    kind, size = _checked(name, datatype, shape)
    if kind == "BYTES":
        return Tensor(name, kind, tuple(shape), _elements(name, memoryview(raw), size))
    dtype = np.dtype(_DTYPES[kind])
    if len(raw) != size * dtype.itemsize:
        raise RequestError(
            f"the input {quoted(name)} has {len(raw)} bytes, its shape {_shown(shape)} of {kind} needs "
            f"{size * dtype.itemsize}"
        )
    return Tensor(name, kind, tuple(shape), np.frombuffer(raw, dtype).reshape(tuple(shape)))


def from_elements(name: str, shape: Sequence[int], values: Sequence[bytes]) -> Tensor:
    """Read a tensor of BYTES from its elements.

    Raises:
        RequestError: if there are more or fewer than the shape needs.
    """
    kind, size = _checked(name, "BYTES", shape)
    if len(values) != size:
        raise RequestError(f"the input {quoted(name)} has {len(values)} elements, its shape says {size}")
    return Tensor(name, kind, tuple(shape), list(values))


def from_plain(name: str, datatype: str, shape: Sequence[int], data: object) -> Tensor:
    """Read a tensor from a list of JSON, flat or nested like its shape; an element of BYTES is base64.

    Raises:
        RequestError: as ``from_raw``, and where an element has another type or does not fit.
    """
    kind, size = _checked(name, datatype, shape)
    flat = _flat(data, len(shape)) if isinstance(data, list) else None
    if flat is None or len(flat) != size:
        found = type(data).__name__ if flat is None else f"{len(flat)} elements"
        raise RequestError(
            f"the input {quoted(name)} has {found} as data, its shape {_shown(shape)} needs a list of {size}"
        )
    if kind == "BYTES":
        if wrong := [value for value in flat if not isinstance(value, str)]:
            raise RequestError(f"the input {quoted(name)} holds {quoted(wrong[0])}, expected base64")
        return Tensor(name, kind, tuple(shape), [parse_base64(value) for value in flat])
    return from_numbers(name, kind, shape, flat)


def from_numbers(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """Read a tensor from a flat list of numbers.

    Raises:
        RequestError: as ``from_plain``.
    """
    kind, size = _checked(name, datatype, shape)
    if kind == "BYTES" or len(values) != size:
        raise RequestError(
            f"the input {quoted(name)} has {len(values)} numbers, its shape {_shown(shape)} of {kind} needs others"
        )
    if not {int, float}.issuperset(
        map(type, values)
    ):  # numpy reads text, true, null and lists of lists as well
        wrong = next(value for value in values if type(value) not in (int, float))
        raise RequestError(f"the input {quoted(name)} holds {quoted(wrong)}, which is no number")
    dtype = np.dtype(_DTYPES[kind])
    try:
        found = np.array(values, np.float64)
    except OverflowError as error:
        raise RequestError(f"the input {quoted(name)} holds a number that is too large") from error
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not (
            np.isfinite(found).all()
            and (found == np.rint(found)).all()
            and (found >= limits.min).all()
            and (found <= limits.max).all()
        ):
            raise RequestError(f"the input {quoted(name)} holds a number that {kind} cannot hold")
    with np.errstate(over="ignore"):  # becomes infinite, as it would be in the bytes of such a tensor
        return Tensor(name, kind, tuple(shape), found.astype(dtype).reshape(tuple(shape)))


def _checked(name: str, datatype: str, shape: Sequence[int]) -> tuple[Datatype, int]:
    """Return the datatype, and how many elements the shape has."""
    known: tuple[Datatype, ...] = get_args(Datatype)
    kind = next((kind for kind in known if kind == datatype), None)
    if kind is None:
        raise RequestError(
            f"the input {quoted(name)} has the datatype {quoted(datatype)}",
            hint=f"known are {', '.join(known)}",
        )
    if not 1 <= len(shape) <= 8 or any(extent < 0 for extent in shape):
        raise RequestError(
            f"the input {quoted(name)} has the shape {_shown(shape)}, expected 1 to 8 extents from 0 on"
        )
    most = _MOST_ELEMENTS.get(kind, _MOST_NUMBERS)
    if math.prod(extent or 1 for extent in shape) > most:  # an extent of 0 makes nothing of the others
        raise RequestError(
            f"the input {quoted(name)} has the shape {_shown(shape)}, which is more than {most} elements",
            hint="send fewer videos in one request",
        )
    return kind, math.prod(shape)


def _elements(name: str, raw: memoryview, size: int) -> list[bytes]:
    found: list[bytes] = []
    place = 0
    while place < len(raw) and len(found) <= size:
        begin = place + _LENGTH.size
        if begin > len(raw) or begin + (length := _LENGTH.unpack_from(raw, place)[0]) > len(raw):
            raise RequestError(
                f"the input {quoted(name)} is cut off in its element {len(found)}",
                hint="each element is its length as 4 bytes, little-endian, and its bytes",
            )
        found.append(bytes(raw[begin : begin + length]))
        place = begin + length
    if len(found) != size:
        more = " or more" if place < len(raw) else ""
        raise RequestError(f"the input {quoted(name)} has {len(found)}{more} elements, its shape says {size}")
    return found


def _flat(data: list[Any], depth: int) -> list[Any]:
    """Flatten lists, as deep as a shape is long: what is nested deeper stays, and is refused by its type."""
    for _ in range(depth - 1):
        if not any(isinstance(value, list) for value in data):
            break
        data = [inner for value in data for inner in (value if isinstance(value, list) else [value])]
    return data


def _shown(shape: Sequence[int]) -> str:
    return quoted(list(shape[:9]))
