"""Videos below a prefix of an object store, in the order of their names, as they are listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.datasets.entries import VIDEO_SUFFIXES, LeftOut, Omissions
from ivdr_deploy.errors import DataError
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.remote import UrlSource, changed_ns, file_system

_Page = tuple[list[tuple[str, int, int]], list[str]]
"""A part of what lies in a folder: objects with size in bytes and time of change in ns, and the folders in it."""


class UrlStream:
    """The videos below ``s3://bucket/prefix``, each as source, uri (below the prefix) and label (None).

    One folder of the store is listed at a time, those in it after its files.
    """

    def __init__(self, url: str) -> None:
        self.source = url.rstrip("/")
        self._left = Omissions()

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was passed over so far, by reason."""
        return self._left.found()

    def __iter__(self) -> Iterator[tuple[UrlSource, str, None]]:
        """Go through the store, once, holding one page of its answer.

        Raises:
            DataError: if it cannot be listed, or holds no videos.
            MissingDependencyError: if the package for its scheme is not installed.
        """
        scheme, _, path = self.source.partition("://")
        system = file_system(scheme)
        bucket, _, key = path.partition("/")
        top = f"{key}/" if key else ""
        found, waiting, max_bytes = False, [top], VideoLimits().max_bytes
        while waiting:
            folder, below = waiting.pop(), []
            for objects, folders in self._pages(system, bucket, folder):
                below += folders
                for name, size, changed in objects:
                    uri = name[len(top) :]
                    if name == folder:
                        continue  # the folder itself, as some tools write it
                    if f".{name.rpartition('.')[2].lower()}" in VIDEO_SUFFIXES:
                        found = True
                        where = f"{scheme}://{bucket}/{name}"
                        yield UrlSource(where, max_bytes, size, changed), uri, None
                    else:
                        self._left.add("without the suffix of a video", uri)
            waiting += reversed(below)
        if not found:
            self._require_place(system, path)
            passed = "; ".join(map(str, self.left_out))
            raise DataError(
                f"{quoted(self.source)} holds no videos" + (f" (left out: {passed})" if passed else "")
            )

    def _pages(self, system: Any, bucket: str, folder: str) -> Iterator[_Page]:
        scheme = self.source.partition("://")[0]
        try:
            yield from _PAGES[scheme](system, bucket, folder)
        except Exception as error:
            raise self._unlisted(f"{scheme}://{bucket}/{folder}".rstrip("/"), error) from error

    def _require_place(self, system: Any, path: str) -> None:
        """Say what there is where nothing lies below a prefix."""
        try:
            kind = system.info(path)["type"]
        except Exception as error:
            raise self._unlisted(self.source, error) from error
        if kind != "directory":
            raise DataError(
                f"{quoted(self.source)} is an object; expected a prefix below which there are videos",
                hint="a list of videos lies on this machine, and may name objects",
            )

    @staticmethod
    def _unlisted(where: str, error: Exception) -> DataError:
        return DataError(
            f"{quoted(where)} cannot be listed ({type(error).__name__}: {reason_of(error, most=100)})",
            hint="check the name and the rights",
        )


def _s3_pages(system: Any, bucket: str, folder: str) -> Iterator[_Page]:
    """Yield what is in a folder, a thousand objects at a time."""
    more: dict[str, str] = {}
    while True:
        told = system.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=folder, Delimiter="/", **system.req_kw, **more
        )
        yield (
            [(entry["Key"], int(entry["Size"]), changed_ns(entry)) for entry in told.get("Contents", ())],
            [entry["Prefix"] for entry in told.get("CommonPrefixes", ())],
        )
        if not told.get("IsTruncated"):
            return
        more = {"ContinuationToken": told["NextContinuationToken"]}


def _gs_pages(system: Any, bucket: str, folder: str) -> Iterator[_Page]:
    """Yield what is in a folder, a thousand objects at a time."""
    more: dict[str, str] = {}
    while True:
        told = system.call("GET", "b/{}/o", bucket, prefix=folder, delimiter="/", json_out=True, **more)
        yield (
            [(entry["name"], int(entry["size"]), changed_ns(entry)) for entry in told.get("items", ())],
            list(told.get("prefixes", ())),
        )
        if not told.get("nextPageToken"):
            return
        more = {"pageToken": told["nextPageToken"]}


_PAGES: dict[str, Callable[[Any, str, str], Iterator[_Page]]] = {"s3": _s3_pages, "gs": _gs_pages}
"""By scheme. The ``ls`` of either library gathers the whole folder first, which may be one of a million objects."""
