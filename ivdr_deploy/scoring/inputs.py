"""The inputs of a run, one after the other: what tells one from another, and which of a list are scored."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ivdr_deploy._files import sha256_file
from ivdr_deploy._text import as_text, quoted
from ivdr_deploy.datasets.entries import FORMATS, LeftOut, Omissions
from ivdr_deploy.datasets.lists import VideoList, VideoStream
from ivdr_deploy.datasets.remote import UrlStream
from ivdr_deploy.errors import ConfigError, DataError, VideoError
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.remote import UrlSource, WebSource, is_url, is_web
from ivdr_deploy.video.source import PathSource, Source
from ivdr_deploy.video.urls import UrlSettings

_ID_DIGITS, _KEY_DIGITS = 16, 24
"""Of the SHA-256 of a uri in a video id, and in a key, where two that are alike would lose a row."""

_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)

_ABSENT = (-1, 0)
"""Size and time of change of what is not there, or cannot be looked at."""


class Input(NamedTuple):
    """One input of a run. A tuple of text, since a list may have millions."""

    position: int
    """Place among the inputs of the run, from 0."""

    uri: str
    """As the list writes it; valid Unicode."""

    label: str | None
    """As the list says."""

    video_id: str
    """Of the uri alone: which video it is."""

    key: str
    """24 hex digits of the SHA-256 of the uri, then size in bytes and time of change in ns (``-1-0`` of no file), or
    the SHA-256 of the file: a row belongs to a key, and a file that is another one has another."""

    file: str | Source
    """Where it is: a path of this machine, or what fetches it."""

    sha256: str | None = None
    """Of the file, where it was asked for."""

    unreadable: str | None = None
    """Why there is no SHA-256 although the file is there."""

    @property
    def source(self) -> Source:
        """The video, as decoders take it."""
        return PathSource(Path(self.file)) if isinstance(self.file, str) else self.file


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which inputs of a list are scored; all by default."""

    limit: int | None = None
    """The first so many."""

    since: datetime | None = None
    """Those whose file was changed then or later."""

    share: tuple[int, int] | None = None
    """``(i, n)``: the i-th of n shares, counted from 1. Which share an input is in depends on its uri alone."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"the limit must be at least 1, found {self.limit}")
        if self.share is not None and not 1 <= self.share[0] <= self.share[1]:
            raise ConfigError(
                f"there is no share {self.share[0]} of {self.share[1]}", hint="the first of four is 1/4"
            )

    @property
    def partial(self) -> bool:
        """Whether the rest of the list is left for another run, so that rows of other inputs stay."""
        return self.limit is not None or self.since is not None


class InputStream:
    """The inputs of a run, in the order of the list. Goes through it once.

    Args:
        videos: The list; a ``VideoStream`` is read while it is gone through.
        selection: Which of them.
        hash_files: Whether the SHA-256 tells files apart, instead of size and time of change.
        hosts: Web servers from which videos are fetched, see ``UrlSettings``.

    Raises:
        ConfigError: if one of ``hosts`` is none.
    """

    def __init__(
        self,
        videos: VideoList | VideoStream | UrlStream,
        selection: Selection,
        *,
        hash_files: bool = False,
        hosts: tuple[str, ...] = (),
    ) -> None:
        self.selection, self._hosts = selection, UrlSettings(hosts=hosts).hosts
        self._videos, self._hash, self._left = videos, hash_files, Omissions()
        self._found: Iterator[tuple[Any, ...]] = iter(
            self._each_once(videos) if isinstance(videos, VideoList) else videos
        )
        """Each begins with where it is, uri and label: an ``Entry``, or the like."""

    def _each_once(self, videos: VideoList) -> Iterator[tuple[str | Source, str, str | None]]:
        """Yield the items of a list that somebody made; what ``read_video_list`` gives holds no video twice."""
        seen: set[tuple[str, Path]] = set()
        for item in videos.items:
            if (item.uri, item.path) in seen:
                self._left.add("repeated", item.uri)
                continue
            seen.add((item.uri, item.path))
            yield _place(item.source), as_text(item.uri), item.label

    def require_any(self) -> None:
        """Look at the beginning of the list, before anything is written.

        Raises:
            DataError: if it cannot be read, or holds no videos.
        """
        first = next(self._found, None)
        if first is None:  # of a ``VideoList``: the streams say so themselves
            raise DataError(f"{self._videos.source} holds no videos", hint=f"expected {FORMATS}")
        self._found = chain([first], self._found)

    @property
    def partial(self) -> bool:
        """Whether inputs that are not among these keep their rows; known when the list was gone through."""
        return self.selection.partial or self.unread

    @property
    def unread(self) -> bool:
        """Whether a folder of the list could not be read, so far."""
        return any(entry.unread for entry in self._videos.left_out)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was passed over so far, by reason."""
        return (*self._videos.left_out, *self._left.found())

    def __iter__(self) -> Iterator[Input]:
        """Yield them. Written out, since each call costs a list of millions a tenth of a second for a million."""
        chosen, position, sha256 = self.selection, 0, hashlib.sha256
        since = None if chosen.since is None else (chosen.since - _EPOCH) // _MICROSECOND * 1000
        for entry in self._found:
            file, uri, label = entry[:3]
            if position == chosen.limit:
                self._left.add("behind the limit", uri)
                continue
            if "\\" in uri:
                digest = _spelled_digest(file, uri)
            else:
                digest = sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()
            video = digest[:_ID_DIGITS]
            if chosen.share is not None and int(video, 16) % chosen.share[1] != chosen.share[0] - 1:
                self._left.add("of other shares", uri)
                continue
            if isinstance(file, str) and "://" in file:
                file = self._elsewhere(file)
            size, changed = _ABSENT
            if not isinstance(file, str):
                size, changed = _identity(file)
            else:
                try:
                    status = os.stat(file)
                    if stat.S_ISREG(status.st_mode):
                        size, changed = status.st_size, status.st_mtime_ns
                except (OSError, ValueError):  # ValueError: a null byte in the path
                    pass
            if since is not None and changed < since:
                told = f"not changed since {chosen.since}" if changed else "without a time of change"
                self._left.add(told, uri)
                continue
            content, unreadable = _hashed(file, uri) if self._hash else (None, None)
            told = f"{size}-{changed}" if content is None else content
            key = f"{digest[:_KEY_DIGITS]}-{told}"
            # What the class itself does with them, in half the time.
            yield tuple.__new__(Input, (position, uri, label, video, key, file, content, unreadable))
            position += 1

    def _elsewhere(self, file: str) -> str | Source:
        """Return what fetches a video that is not on this machine."""
        if is_web(file):
            return WebSource(file, self._hosts, VideoLimits().max_bytes)
        return UrlSource(file, VideoLimits().max_bytes) if is_url(file) else file


def video_id(uri: str) -> str:
    """Return the id of an input: the first 16 hex digits of the SHA-256 of its uri.

    It depends on nothing else, so that the tables of two models over overlapping lists can be joined on it. Where bytes
    in the name are no text, the id of an input is that of the bytes.
    """
    return _digest(uri)[:_ID_DIGITS]


def _digest(uri: str) -> str:
    return hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()


def _spelled_digest(file: str | Source, uri: str) -> str:
    """Return the digest of a uri in which bytes may be spelled that are no text.

    Their spelling may be the name of another file, so that the digest is of the bytes.
    """
    path = os.fsencode(file) if isinstance(file, str) else b""
    raw = b"/".join(path.split(b"/")[-uri.count("/") - 1 :])
    try:
        raw.decode()
    except UnicodeDecodeError:
        return hashlib.sha256(raw).hexdigest()
    return _digest(uri)


def _identity(source: Source) -> tuple[int, int]:
    """Return size and time of change in ns; those of ``_ABSENT`` where there is none."""
    try:
        found = source.identity()
    except VideoError:
        return _ABSENT
    return found.size_bytes, found.changed_ns or 0


def _hashed(file: str | Source, uri: str) -> tuple[str | None, str | None]:
    """Return the SHA-256 of a file, or why it cannot be read; neither where there is no file."""
    try:
        if not isinstance(file, str):
            with file.open() as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest(), None  # type: ignore[arg-type]
        return (sha256_file(Path(file)) if os.path.isfile(file) else None), None
    except VideoError:
        return None, None  # decoding meets it again, and says why
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return None, f"{quoted(uri)} cannot be read for its SHA-256: {reason}"


def _place(source: Source) -> str | Source:
    return os.fspath(source.path) if isinstance(source, PathSource) else source


def parse_since(text: str) -> datetime:
    """Read a date or time, ISO 8601; without a zone it is UTC.

    Raises:
        ConfigError: if it is none.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{quoted(text)} is no date", hint="such as 2026-11-29, or 2026-11-29T08:30+01:00"
        ) from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def parse_share(text: str) -> tuple[int, int]:
    """Read ``i/n``.

    Raises:
        ConfigError: if it is something else.
    """
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and len(text) < 20):
        raise ConfigError(f"{quoted(text)} is no share", hint="such as 1/4 for the first of four")
    return int(first), int(second)
