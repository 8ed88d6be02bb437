"""What every form of a list is read into: entries, and the count of what was left out."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO, cast

from ivdr_deploy._text import as_text, one_line, quoted
from ivdr_deploy.errors import DataError
from ivdr_deploy.video.remote import is_url, is_web

VIDEO_SUFFIXES = frozenset(
    {".264", ".265", ".3gp", ".asf", ".avi", ".flv", ".gif", ".h264", ".h265", ".hevc", ".m1v", ".m2ts"}
    | {
        ".m2v",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    }
)
"""What counts as a video when a folder is listed. In a list file any name goes."""

FORMATS = (
    "a folder of videos, a folder of class folders, a csv or parquet file with the columns path and label or path, "
    "or a text list"
)

_NAMED = 3
"""Examples that a message names; the rest are counted."""

_SIMPLE = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_. -]*/)*[A-Za-z0-9_-][A-Za-z0-9_. -]*")
"""Relative paths that mean what is written, in every locale."""

_LONGEST = 1 << 20
"""Bytes of a line of a list, far more than one has: a file that is no list may have no line ends."""

_LOOKED_AT = 4096
"""Bytes at the beginning of a list file that tell whether it is text."""


class Entry(NamedTuple):
    """One video as a list names it. A tuple of text: there may be millions, and a ``Path`` costs more than the rest."""

    file: str
    """Where the file is, as Python spells paths."""

    uri: str
    """The path as the list writes it; below a folder, relative to it. Valid Unicode."""

    label: str | None
    key: str
    """The same for all entries of one file."""

    group: str | None = None
    """What it shares with other videos, when the list says it."""

    place: str = ""
    """What ``number`` counts, such as ``list.csv: line``; empty where the uri says it all."""

    number: int = 0

    @property
    def where(self) -> str:
        """Place in the list, such as ``list.csv: line 3``, for messages."""
        return f"{self.place} {self.number}" if self.place else ""

    @property
    def path(self) -> Path:
        """Where the file is."""
        return Path(self.file)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a listing passed over, for one reason."""

    reason: str
    count: int
    examples: tuple[str, ...]
    """The first few."""

    unread: bool = False
    """Whether they are folders that could not be read: there may be videos in them."""

    def __str__(self) -> str:
        return f"{self.count} {self.reason}: {some(self.examples, self.count)}"


def any_unread(left_out: Iterable[LeftOut]) -> bool:
    """Say whether a folder of a listing could not be read: exit code 1, since there may be videos in it."""
    return any(entry.unread for entry in left_out)


class Omissions:
    """Counts what a listing passes over."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}
        self._unread: set[str] = set()

    def add(self, reason: str, example: str, *, unread: bool = False) -> None:
        """Count one thing that is left out; ``unread`` as in ``LeftOut``."""
        if unread:
            self._unread.add(reason)
        self._counts[reason] = self._counts.get(reason, 0) + 1
        if len(examples := self._examples.setdefault(reason, [])) < _NAMED:
            examples.append(example)

    def found(self) -> tuple[LeftOut, ...]:
        """Return what was counted, by reason."""
        return tuple(
            LeftOut(reason, count, tuple(self._examples[reason]), reason in self._unread)
            for reason, count in self._counts.items()
        )


class Root:
    """Where the relative paths of a list start; made once for a list, which may be long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before, self.before_absolute = (
            os.path.join(way, "") for way in (os.fspath(path), os.path.abspath(path))
        )


def listed(
    root: Root, written: str, label: str | None, place: str, number: int, *, group: str | None = None
) -> Entry:
    """Make an entry of what a list file writes.

    Args:
        root: Where relative paths start.
        written: The path, read as UTF-8; bytes that are not are lone surrogates. ``~/`` is the home folder.
        label: The class, if there is one.
        place: As in ``Entry``, and so is ``number``: made into a message only where there is one.
        number: See ``place``.
        group: The group, if there is one.

    Raises:
        DataError: if the label is not UTF-8.
    """
    if _SIMPLE.fullmatch(written) and (
        label is None or label.isascii()
    ):  # nearly all of a list; it may be long
        file, key = root.before + written, root.before_absolute + written
        # What the class itself does with them, in half the time.
        return tuple.__new__(Entry, (file, written, label or None, key, group or None, place, number))
    if label is not None and not label.isascii():
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place} {number}: the label {quoted(label)} is not UTF-8", hint="save the list as UTF-8"
            ) from error
    if is_url(written) or is_web(written):
        uri = as_text(written)
        return Entry(uri, uri, label or None, uri, group or None, place, number)
    # Whatever the locale, the path has the bytes that stand in the list.
    plain = written.isascii()
    local = written if plain else os.fsdecode(written.encode("utf-8", "surrogateescape"))
    file = os.path.join(root.path, os.path.expanduser(local) if local.startswith("~/") else local)
    uri = written if plain else as_text(written)
    return Entry(file, uri, label or None, os.path.abspath(file), group or None, place, number)


@contextmanager
def open_list(source: Path) -> Iterator[BinaryIO]:
    """Open a list file. Whoever reads it to its end has read it as it stood at one moment.

    Raises:
        DataError: if it cannot be read, or was written to meanwhile.
    """
    try:
        with source.open("rb") as stream:
            before = _written(stream)
            try:
                yield stream
            except DataError as error:
                if _written(stream) != before:  # what is wrong in it may be no more than half of a line
                    raise changing(source) from error
                raise
            if _written(stream) != before:
                raise changing(source)
    except OSError as error:
        if error.errno is None:  # not of the system: what a reader says of what is in the file
            raise
        raise DataError(f"{source} cannot be read ({error.strerror})") from error


def _written(stream: BinaryIO) -> tuple[int, int]:
    """Return what tells whether a file was written to: its size and time of change."""
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def changing(source: Path) -> DataError:
    """Return the error for a list file that was written to while it was read."""
    return DataError(
        f"{source} was written to while it was read, so that what was read of it may not be whole",
        hint="run the command again when it is written; a list that is renamed into its place is always whole",
    )


@contextmanager
def open_text(source: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open a list file as UTF-8; bytes in it that are not become lone surrogates, since paths may hold any.

    Raises:
        DataError: if it cannot be read, is no text, has a line of megabytes, or was written to meanwhile.
    """
    with open_list(source) as stream:
        if b"\0" in stream.read(_LOOKED_AT):
            raise DataError(
                f"{source} cannot be read as text: there are null bytes in it",
                hint=f"save a list as UTF-8; expected {FORMATS}",
            )
        stream.seek(0)
        bounded = cast(BinaryIO, _BoundedLines(stream, source))
        text = io.TextIOWrapper(bounded, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
        yield text
        text.detach()  # it would close the file


class _BoundedLines(io.BufferedIOBase):
    """The bytes of a list, looked at a piece at a time, since a list may have millions of lines."""

    def __init__(self, stream: BinaryIO, source: Path) -> None:
        self._stream, self._source, self._length = stream, source, 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        end = max(piece.rfind(b"\n"), piece.rfind(b"\r"))
        self._length = self._length + len(piece) if end < 0 else len(piece) - end - 1
        if self._length > _LONGEST:
            raise DataError(
                f"{self._source} has a line of more than {_LONGEST} bytes", hint=f"expected {FORMATS}"
            )
        return piece


def some(values: Iterable[str], count: int | None = None) -> str:
    """Name the first few of some values.

    Args:
        values: All of them, or at least the first few.
        count: How many there are, where ``values`` does not hold all.
    """
    values = list(values)
    shown = [value if len(value) <= 100 else f"{value[:97]}..." for value in map(one_line, values[:_NAMED])]
    more = (len(values) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
