"""What an ONNX file refers to outside itself, which no digest covers. Needs only the standard library, not onnx."""

from __future__ import annotations

import mmap
from pathlib import Path

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import ArtifactError

_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {},
}
"""Where tensors are in ``onnx.proto``: for each message the numbers of the fields that lead to them."""

_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_MAX_DEPTH = 100
"""Of messages; protobuf's own limit."""


def require_self_contained(path: Path) -> None:
    """Refuse an ONNX file with tensors whose values lie in another file.

    Raises:
        ArtifactError: if it has such, or is no ONNX file.
        OSError: if it cannot be opened.
    """
    hint = "take the file that `ivdr export` wrote, which holds all of its weights"
    with path.open("rb") as stream:
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                outside = _refers_outside(data, 0, len(data), "model", 0)
        except (ValueError, IndexError) as error:  # an empty file, or no messages
            raise ArtifactError(
                f"{path} is not a readable ONNX file ({reason_of(error)})", hint=hint
            ) from error
    if outside:
        raise ArtifactError(f"{path} refers to weights in another file", hint=hint)


def _refers_outside(data: mmap.mmap, place: int, end: int, kind: str, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise ValueError("messages nested too deeply")
    while place < end:
        key, place = _varint(data, place)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            if kind == "tensor" and field == _DATA_LOCATION and value:
                return True
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, place = _varint(data, place)
        if size is None or place + size > end:
            raise ValueError(f"a field of kind {wire} ends outside its message")
        if kind == "tensor" and field == _EXTERNAL_DATA:
            return True
        inner = _MESSAGES[kind].get(field)
        if wire == 2 and inner and _refers_outside(data, place, place + size, inner, depth + 1):
            return True
        place += size
    return False


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number without an end")
