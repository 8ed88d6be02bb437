"""Videos elsewhere: the file is fetched whole, in the process that decodes it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ivdr_deploy._optional import require
from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import ConfigError, FetchError, UrlError, VideoLimitError, VideoOpenError
from ivdr_deploy.video.fetch import Fetcher
from ivdr_deploy.video.source import Source, SourceIdentity
from ivdr_deploy.video.urls import UrlSettings, is_public

EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""Schemes of object stores, the package that reads each, and the extra that installs it."""

WEB: tuple[Literal["https", "http"], ...] = ("https", "http")
"""Schemes that name a file of a web server."""

_WEB_SECONDS = 60.0
"""Time that fetching such a file may take."""


def is_url(where: str) -> bool:
    """Whether text names a place in an object store, and no path of this machine."""
    return "://" in where and where.partition("://")[0] in EXTRAS


def is_web(where: str) -> bool:
    """Whether text names a file of a web server."""
    return "://" in where and where.partition("://")[0] in WEB


@lru_cache(maxsize=8)
def file_system(scheme: str) -> Any:
    """Return the file system (fsspec) of a scheme. It remembers no listing.

    Raises:
        MissingDependencyError: if its package is not installed.
        ConfigError: if the scheme is none of ``EXTRAS``.
    """
    if scheme not in EXTRAS:
        raise ConfigError(
            f"{quoted(scheme)}:// is not read; expected {', '.join(f'{name}://' for name in EXTRAS)}"
        )
    module, extra = EXTRAS[scheme]
    require(module, extra=extra)
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)


@dataclass(frozen=True, slots=True)
class UrlSource(Source):
    """An object of a store."""

    uri: str
    max_bytes: int
    size_bytes: int | None = None
    """Size and time of change where a listing told them."""

    changed_ns: int = 0

    def local(self) -> Path | bytes:
        """Fetch the object, unless it is larger than ``max_bytes``: it is held in memory, all of it."""
        size = self.identity().size_bytes
        if size > self.max_bytes:
            raise VideoLimitError(
                f"{quoted(self.uri)} has {size} bytes, more than the limit of {self.max_bytes}",
                hint="cut it, or encode it smaller",
            )
        try:
            return self._system.cat_file(self.uri)  # type: ignore[no-any-return]
        except MemoryError:
            raise  # neither the name nor the rights: the decode stage tells it as a limit
        except Exception as error:
            raise VideoOpenError(
                f"{quoted(self.uri)} cannot be fetched ({type(error).__name__}: {reason_of(error, most=100)})",
                hint="check the name and the rights",
            ) from error

    def open(self) -> BinaryIO:
        """Fetch the object, and open it."""
        found = self.local()
        assert isinstance(found, bytes)
        return io.BytesIO(found)

    def identity(self) -> SourceIdentity:
        """Return size and time of change, asked for unless a listing told them."""
        if self.size_bytes is not None:
            return SourceIdentity(self.size_bytes, self.changed_ns)
        try:
            found = self._system.info(self.uri)
            return SourceIdentity(int(found["size"]), changed_ns(found))
        except Exception as error:
            raise VideoOpenError(
                f"{quoted(self.uri)} cannot be looked at ({type(error).__name__}: {reason_of(error, most=100)})",
                hint="check the name and the rights",
            ) from error

    @property
    def _system(self) -> Any:
        return file_system(self.uri.partition("://")[0])


@dataclass(frozen=True, slots=True)
class WebSource(Source):
    """A file of a web server. Nothing tells that it changed: another version needs another URL."""

    uri: str
    hosts: tuple[str, ...]
    """Which servers are asked, see ``UrlSettings``. Where each is named, also those of this network."""

    max_bytes: int

    def local(self) -> Path | bytes:
        """Fetch the file."""
        if not self.hosts:
            raise VideoOpenError(
                f"{quoted(self.uri)} is not fetched: no web server is named",
                hint="name it: `--retry-failed --url-host HOST`",
            )
        settings = UrlSettings(hosts=self.hosts, schemes=WEB, seconds=_WEB_SECONDS)
        known = not any("*" in host for host in self.hosts)
        allowed = (lambda _: True) if known else is_public
        try:
            return Fetcher(settings, max_bytes=self.max_bytes, may_connect=allowed).fetch(self.uri)
        except UrlError as error:
            raise VideoOpenError(
                f"{quoted(self.uri)} is not fetched: {error.message}",
                hint="name it: `--retry-failed --url-host HOST`; `--url-host '*'` stands for every public one",
            ) from error
        except FetchError as error:
            raise VideoOpenError(f"{quoted(self.uri)} cannot be fetched: {error.message}") from error

    def open(self) -> BinaryIO:
        """Fetch the file, and open it."""
        found = self.local()
        assert isinstance(found, bytes)
        return io.BytesIO(found)

    def identity(self) -> SourceIdentity:
        """Return nothing: a list of a million URLs cannot ask for each."""
        return SourceIdentity(0, None)


def changed_ns(info: dict[str, Any]) -> int:
    """Return the time of change that a store tells, in nanoseconds; 0 where it tells none."""
    found = info.get("LastModified") or info.get("mtime") or info.get("updated")
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    return int(found.timestamp() * 1e9) if isinstance(found, datetime) else 0
