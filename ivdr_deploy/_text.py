"""Text that goes out: a file name may hold any bytes; what is printed or stored is always valid Unicode."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Sequence
from typing import Any

QUOTED = 80
"""Characters of a foreign value that a message shows."""

_REPR = reprlib.Repr()  # looks no deeper and no further than it shows
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 4 * QUOTED

NAMED = 255
"""Characters that a name in a foreign file may have: of a variant, a version, a provider."""

_CONTROLS = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
"""Line ends and other control characters, as JSON spells them, so that a line of JSON stays JSON."""


def as_text(value: str | os.PathLike[str]) -> str:
    r"""Return text that every encoding of Unicode can hold; bytes that are no text are spelled, as in ``caf\xe9.avi``.

    Args:
        value: Text, in which Python keeps such bytes as lone surrogates, or a path. Of a path the result depends on its
            bytes alone, not on the locale.
    """
    if not isinstance(value, str):
        return os.fsencode(value).decode("utf-8", "backslashreplace")
    try:
        found = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        found = value.encode("utf-8", "surrogatepass")
    return found.decode("utf-8", "backslashreplace")


def is_utf8(path: os.PathLike[str]) -> bool:
    """Say whether a path is UTF-8, on the disk as in this locale: libraries that are given text open no other."""
    try:
        return os.fspath(path).encode() == os.fsencode(path)
    except UnicodeEncodeError:  # bytes that are no text
        return False


def one_line(value: str | os.PathLike[str]) -> str:
    """Return ``as_text``, with line ends and other control characters spelled: a name may hold those too."""
    return as_text(value).translate(_CONTROLS)


def is_plain(name: str, *, most: int = NAMED) -> bool:
    """Say whether a name from a foreign file can stand in a message or a table as it is: one line, and not too long."""
    return 0 < len(name) <= most and one_line(name) == name


def as_file_name(name: str) -> str:
    """Return a name from a foreign file as a part of the name of a file: it leads to no other folder."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100].lstrip(".") or "_"


def reason_of(error: BaseException, *, most: int = 200, whole: bool = False) -> str:
    """Return the first line of what somebody else's error says, cut short; its type where it says nothing.

    A library quotes the file that it could not read, with whatever stands in it.

    Args:
        error: Of a library, or of the system.
        most: Characters.
        whole: All lines as one, for a library that says what is wrong in several.
    """
    lines = [words for line in str(error)[: 100 * most].splitlines() if (words := " ".join(line.split()))]
    said = " ".join(lines if whole else lines[:1])
    return one_line(said[:most]) or type(error).__name__


def quoted(value: Any) -> str:
    """Show a foreign value, cut short: it may be megabytes long, or nested without end."""
    try:
        text = _REPR.repr(value[:QUOTED] if isinstance(value, str | bytes | bytearray) else value)
    except ValueError:  # a whole number with more digits than Python writes
        text = f"a very large {type(value).__name__}"
    return as_text(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")


def cut(text: str, most: int) -> str:
    """Return text of at most so many characters; what is cut off is told by three dots."""
    return text if len(text) <= most else f"{text[:most]}..."


def few(texts: Sequence[Any], *, most: int = 5, joint: str = ", ") -> str:
    """Join the first of some texts and say how many more there are; ``none`` where there is none."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return joint.join(texts[:most]) + more or "none"


def quoted_few(values: Sequence[Any], *, most: int = 5) -> str:
    """Show the first of some foreign values as ``few`` does."""
    return few([*map(quoted, values[:most]), *values[most:]], most=most)
