"""Protobuf messages that somebody sent: how many parts one has is looked at before they are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError

from ivdr_deploy.errors import RequestError
from ivdr_deploy.serving.core.oip import MOST_PARTS

_NUMBER, _WITH_LENGTH, _FIXED = 0, 2, {1: 8, 5: 4}
"""How a field is written, by the last three bits of its tag; the last are those of so many bytes."""

_LAST_TAG = (1 << 32) - 1

_OF_PARTS = ("inputs", "outputs")
"""Fields of a request whose messages hold fields of which there may be many."""

_HINT = "see the messages of the Open Inference Protocol (KServe v2); every string in them is UTF-8"


def parse(kind: Any, message: bytes) -> Any:
    """Make a message of what came.

    Args:
        kind: Class of the message.
        message: Its bytes.

    Raises:
        RequestError: if they are none, or it has more parts than any request has.
    """
    _check_parts(memoryview(message), kind.DESCRIPTOR)
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise RequestError(f"the message is no {kind.DESCRIPTOR.full_name}", hint=_HINT) from error


def _check_parts(message: memoryview, kind: Any) -> None:
    """Refuse too many parts before they are made: an empty input takes two bytes here, and ninety once it is one."""
    known, counts = kind.fields_by_number, Counter[str]()
    for number, content in _fields(message):
        name = known[number].name if number in known else "unknown fields"
        counts[name] += 1
        if counts[name] > MOST_PARTS:
            raise RequestError(
                f"the message has more than {MOST_PARTS} {name} in its {kind.name}", hint="send fewer"
            )
        if name in _OF_PARTS:
            _check_parts(content, known[number].message_type)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Walk over the fields of a message as it came: their numbers, and the content of those that have a length."""
    place = 0
    while place < len(message):
        tag, place = _number(message, place)
        wire = tag & 7
        size = _FIXED.get(wire, 0)
        if wire in (_NUMBER, _WITH_LENGTH):
            number, place = _number(message, place)
            size = number if wire == _WITH_LENGTH else 0
        elif wire not in _FIXED:
            raise _not_protobuf()
        if tag > _LAST_TAG or place + size > len(message):
            raise _not_protobuf()
        yield tag >> 3, message[place : place + size]
        place += size


def _number(message: memoryview, place: int) -> tuple[int, int]:
    """Return the number that is written at a place, seven bits a byte, and where it ends."""
    number = 0
    for at, byte in enumerate(message[place : place + 10]):
        number |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            return number, place + at + 1
    raise _not_protobuf()


def _not_protobuf() -> RequestError:
    return RequestError("the message is cut off, or none of protobuf", hint=_HINT)
