"""Folders of videos: everything below them, links followed once, and what is passed over counted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ivdr_deploy._text import as_text
from ivdr_deploy.datasets.entries import VIDEO_SUFFIXES, Entry, Omissions
from ivdr_deploy.errors import DataError


def read_folder(folder: Path, left: Omissions) -> Iterator[Entry]:
    """List the videos below a folder. Where all lie in folders of it, these name the classes.

    They come in the order of their paths, one folder at a time; what links lead to comes last. A file that cannot be
    looked at is an entry all the same: whoever reads it gives the reason.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    top = os.fspath(folder)
    labelled = not _holds_video(folder)
    for file, key in _Scan(folder, left).run():
        inside = file[len(top) :].lstrip(os.sep)
        uri = _text(inside if os.sep == "/" else Path(inside).as_posix())
        label = _text(inside.partition(os.sep)[0]) if labelled else None
        yield Entry(file, uri, label, key)


def _text(name: str) -> str:
    return name if name.isascii() else as_text(Path(name))


def _holds_video(folder: Path) -> bool:
    """Whether a video lies in the folder itself, be it a link; see ``_Scan``."""
    try:
        with os.scandir(folder) as entries:
            return any(
                os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES
                and not entry.name.startswith(".")
                and not entry.is_dir()
                and (entry.is_symlink() or not _special(entry))
                for entry in entries
            )
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read ({error.strerror})", hint="check its permissions"
        ) from error


@dataclass
class _Scan:
    """One walk. Links wait until all that is really there is listed, so that a name that is no link comes first."""

    top: Path
    left: Omissions
    links: list[str] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)
    """Folders that were read, by device and number."""

    def run(self) -> Iterator[tuple[str, str]]:
        """Yield the videos, and for each the path without links that tells whether two are the same file."""
        yield from self._walk(os.fspath(self.top))
        while self.links:
            waiting, self.links = sorted(self.links, key=Path), []
            for link in waiting:
                yield from self._follow(link)

    def _walk(self, start: str) -> Iterator[tuple[str, str]]:
        waiting = [self._inside(start)]  # no recursion: a folder may lie thousands deep
        while waiting:
            entry, key = next(waiting[-1], (None, ""))
            if entry is None:
                waiting.pop()
            elif not key:
                waiting.append(self._inside(entry))
            else:
                yield from self._file(entry, key)

    def _inside(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yield the files of a folder as ``run`` does, and the folders in it with an empty key, by name."""
        try:
            found = os.stat(folder)
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._omit(f"folders that cannot be read ({error.strerror})", folder, unread=True)
            return
        self.seen.add((found.st_dev, found.st_ino))
        real = os.path.realpath(folder)
        for entry in inside:
            if entry.name.startswith("."):
                self._omit("hidden", entry.path)
            elif entry.is_symlink():
                self.links.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                yield entry.path, ""
            elif _special(entry):
                self._omit("neither files nor folders", entry.path)
            else:
                yield entry.path, os.path.join(real, entry.name)

    def _follow(self, link: str) -> Iterator[tuple[str, str]]:
        try:
            found = os.stat(link)
        except OSError as error:
            if os.path.splitext(link)[1].lower() in VIDEO_SUFFIXES:
                yield from self._file(link, os.path.abspath(link))
            else:
                self._omit(f"links that lead nowhere ({error.strerror})", link)
            return
        if stat.S_ISDIR(found.st_mode):
            if (found.st_dev, found.st_ino) in self.seen:
                self._omit("links to folders that are listed already", link)
            else:
                yield from self._walk(link)
        elif stat.S_ISREG(found.st_mode):
            yield from self._file(link, os.path.realpath(link))
        else:
            self._omit("neither files nor folders", link)

    def _file(self, file: str, key: str) -> Iterator[tuple[str, str]]:
        if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES:
            yield file, key
        else:
            self._omit("without the suffix of a video", file)

    def _omit(self, reason: str, file: str, *, unread: bool = False) -> None:
        self.left.add(reason, as_text(Path(file).relative_to(self.top)), unread=unread)


def _special(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a pipe, socket or device; one that cannot be looked at is taken for a file."""
    try:
        mode = entry.stat(follow_symlinks=False).st_mode if not entry.is_file(follow_symlinks=False) else 0
    except OSError:
        return False
    return mode != 0 and not stat.S_ISREG(mode)
