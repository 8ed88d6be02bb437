"""Folders of videos: everything below them, links followed once, and what is passed over counted."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from ivdr_deploy._text import as_text
from ivdr_deploy.datasets.entries import VIDEO_SUFFIXES, Entry, Omissions
from ivdr_deploy.errors import DataError


def read_folder(folder: Path, left: Omissions) -> list[Entry]:
    """List the videos below a folder. Where all lie in folders of it, these name the classes.

    A file that cannot be looked at is an entry all the same: whoever reads it gives the reason.

    Raises:
        DataError: if the folder itself cannot be read.
    """
    found = _Scan(folder, left).run()
    labelled = all(path.parent != folder for path, _ in found)
    entries = []
    for path, key in found:
        relative = path.relative_to(folder)
        label = as_text(Path(relative.parts[0])) if labelled else None
        entries.append(Entry(path, as_text(Path(relative.as_posix())), label, key))
    return entries


@dataclass
class _Scan:
    """One walk. Links wait until all that is really there is listed, so that a name that is no link comes first."""

    top: Path
    left: Omissions
    files: list[tuple[Path, str]] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)
    """Folders that were read, by device and number."""

    def run(self) -> list[tuple[Path, str]]:
        """Return the videos, and for each the path without links that tells whether two are the same file."""
        try:
            os.scandir(self.top).close()
        except OSError as error:
            raise DataError(
                f"{self.top} cannot be read ({error.strerror})", hint="check its permissions"
            ) from error
        self._walk(self.top)
        while self.links:
            waiting, self.links = sorted(self.links), []
            for link in waiting:
                self._follow(link)
        return self.files

    def _walk(self, start: Path) -> None:
        folders = [start]
        while folders:
            folder = folders.pop()
            try:
                found = folder.stat()
                with os.scandir(folder) as entries:
                    inside = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self._omit(f"folders that cannot be read ({error.strerror})", folder)
                continue
            self.seen.add((found.st_dev, found.st_ino))
            real = os.path.realpath(folder)
            below = []
            for entry in inside:
                path = folder / entry.name
                if entry.name.startswith("."):
                    self._omit("hidden", path)
                elif entry.is_symlink():
                    self.links.append(path)
                elif entry.is_dir(follow_symlinks=False):
                    below.append(path)
                elif _special(entry):
                    self._omit("neither files nor folders", path)
                else:
                    self._file(path, os.path.join(real, entry.name))
            folders += reversed(below)

    def _follow(self, link: Path) -> None:
        try:
            found = link.stat()
        except OSError as error:
            if link.suffix.lower() in VIDEO_SUFFIXES:
                self._file(link, os.path.abspath(link))
            else:
                self._omit(f"links that lead nowhere ({error.strerror})", link)
            return
        if stat.S_ISDIR(found.st_mode):
            if (found.st_dev, found.st_ino) in self.seen:
                self._omit("links to folders that are listed already", link)
            else:
                self._walk(link)
        elif stat.S_ISREG(found.st_mode):
            self._file(link, os.path.realpath(link))
        else:
            self._omit("neither files nor folders", link)

    def _file(self, path: Path, key: str) -> None:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            self.files.append((path, key))
        else:
            self._omit("without the suffix of a video", path)

    def _omit(self, reason: str, path: Path) -> None:
        self.left.add(reason, as_text(path.relative_to(self.top)))


def _special(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a pipe, socket or device; one that cannot be looked at is taken for a file."""
    try:
        mode = entry.stat(follow_symlinks=False).st_mode if not entry.is_file(follow_symlinks=False) else 0
    except OSError:
        return False
    return mode != 0 and not stat.S_ISREG(mode)
