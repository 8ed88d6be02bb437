"""Videos below a prefix of an object store, in the order of their names, as they are listed."""

from __future__ import annotations

from collections.abc import Iterator

from ivdr_deploy._text import quoted
from ivdr_deploy.datasets.entries import VIDEO_SUFFIXES, LeftOut, Omissions
from ivdr_deploy.errors import DataError
from ivdr_deploy.video.remote import UrlSource, changed_ns, file_system


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
        """Go through the store, once.

        Raises:
            DataError: if it cannot be listed, or holds no videos.
        """
        scheme, _, path = self.source.partition("://")
        system, found = file_system(scheme), False
        waiting = [path]
        while waiting:
            folder = waiting.pop()
            try:
                inside = sorted(system.ls(folder, detail=True), key=lambda info: str(info["name"]))
            except Exception as error:
                raise DataError(
                    f"{quoted(f'{scheme}://{folder}')} cannot be listed ({type(error).__name__}: {str(error)[:100]})",
                    hint="check the name and the rights",
                ) from error
            for info in inside:
                name = str(info["name"]).rstrip("/")
                uri = name[len(path) :].lstrip("/")
                if info["type"] == "directory":
                    continue
                if not uri and not info["name"].endswith("/") and int(info["size"]):
                    raise DataError(
                        f"{self.source} is an object; expected a prefix below which there are videos",
                        hint="a list of videos lies on this machine, and may name objects",
                    )
                if not uri:
                    continue  # the prefix itself, as some tools write it
                if f".{name.rpartition('.')[2].lower()}" in VIDEO_SUFFIXES:
                    found = True
                    source = UrlSource(f"{scheme}://{name}", int(info["size"]), changed_ns(info))
                    yield source, uri, None
                else:
                    self._left.add("without the suffix of a video", uri)
            below = [str(info["name"]).rstrip("/") for info in inside if info["type"] == "directory"]
            waiting += [name for name in reversed(below) if name != folder]
        if not found:
            passed = "; ".join(map(str, self.left_out))
            raise DataError(f"{self.source} holds no videos" + (f" (left out: {passed})" if passed else ""))
