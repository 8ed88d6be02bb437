"""Lists of videos, with or without labels: folders, csv files and plain text lists."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ivdr_deploy.errors import DataError
from ivdr_deploy.video.source import PathSource, Source

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov"}
    | {".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"}
)
"""What counts as a video when a folder is listed. In a csv or text list any name goes."""

_FORMATS = (
    "a folder of videos, a folder of class folders, a csv with the header path,label or path, or a text list"
)
_NAMED = 3
"""Offending entries that an error names; the rest are counted."""

_LIST_LINE = re.compile(
    rf"(?P<path>.*?(?:{'|'.join(map(re.escape, sorted(VIDEO_SUFFIXES)))}))(?:\s+(?P<label>\S.*))?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class VideoItem:
    """One entry of a list."""

    path: Path
    """Where the file is; it may be absent, see ``VideoList.require_files``."""

    label: str | None
    """Class name, when the list gives one."""

    uri: str
    """The path as the list writes it; below a folder, relative to it."""

    @property
    def source(self) -> Source:
        """The video, as decoders take it."""
        return PathSource(self.path)


@dataclass(frozen=True, slots=True)
class VideoList:
    """The videos of one folder or list file, in its order (folders: sorted), each once."""

    source: Path
    items: tuple[VideoItem, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that occur, sorted."""
        return tuple(sorted({item.label for item in self.items if item.label is not None}))

    @property
    def data_hash(self) -> str:
        """SHA-256 (hex) over uri, label and file size of every entry: the identity of a training set."""
        digest = hashlib.sha256()
        for item in self.items:
            size = item.path.stat().st_size if item.path.is_file() else -1
            digest.update(repr((item.uri, item.label, size)).encode())
        return digest.hexdigest()

    def require_files(self) -> None:
        """Refuse a list whose files are not all there.

        Raises:
            DataError: naming the first few that are missing, and how many there are.
        """
        missing = [str(item.path) for item in self.items if not item.path.is_file()]
        if missing:
            raise DataError(
                f"{self.source}: {len(missing)} of {len(self.items)} videos do not exist: {_some(missing)}",
                hint="relative paths start at the folder of the list",
            )

    def require_labels(self) -> None:
        """Refuse a list in which a video has no label.

        Raises:
            DataError: naming the first few without one.
        """
        bare = [item.uri for item in self.items if item.label is None]
        if bare:
            raise DataError(
                f"{self.source}: {len(bare)} of {len(self.items)} videos have no label: {_some(bare)}",
                hint="use a csv with the header path,label, or class folders with no videos beside them",
            )

    def targets(self, labels: Sequence[str]) -> list[int]:
        """Return the position in ``labels`` of every entry's label.

        Raises:
            DataError: if a label is missing, or is not in ``labels``.
        """
        self.require_labels()
        position = {label: i for i, label in enumerate(labels)}
        unknown = [label for label in self.labels if label not in position]
        if unknown:
            raise DataError(
                f"{self.source}: {len(unknown)} classes are unknown to training: {_some(unknown)}",
                hint=f"known classes: {', '.join(labels)}",
            )
        return [position[str(item.label)] for item in self.items]


def read_video_list(path: str | Path) -> VideoList:
    """Read a folder or a list file.

    * a folder with videos in it: those and all below, no labels;
    * a folder without: each folder in it names the class of the videos below it;
    * ``*.csv``: a header line with ``path`` and, if there are labels, ``label``; other columns are ignored;
    * any other file: text, one ``path`` or ``path label`` a line.

    Relative paths start at the folder of the list. Whether the files exist is not checked here.

    Raises:
        DataError: if nothing is at ``path``, it is none of these, it is empty, or it names a video twice.
    """
    source = Path(path)
    if source.is_dir():
        items = _read_folder(source)
    elif not source.is_file():
        raise DataError(f"no list of videos at {source}", hint=f"expected {_FORMATS}")
    elif source.suffix.lower() in VIDEO_SUFFIXES:
        raise DataError(f"{source} is a video, not a list of videos", hint=f"expected {_FORMATS}")
    elif source.suffix.lower() == ".csv":
        items = _read_csv(source)
    else:
        items = _read_text(source)
    if not items:
        raise DataError(f"{source} holds no videos", hint=f"expected {_FORMATS}")
    counts = Counter(os.path.normpath(item.path) for item in items)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise DataError(
            f"{source}: {len(repeated)} videos occur more than once: {_some(repeated)}",
            hint="remove the repeated lines",
        )
    return VideoList(source, tuple(items))


def _read_folder(folder: Path) -> list[VideoItem]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in VIDEO_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    labelled = all(file.parent != folder for file in files)
    items = []
    for file in files:
        relative = file.relative_to(folder)
        items.append(VideoItem(file, relative.parts[0] if labelled else None, relative.as_posix()))
    return items


def _read_csv(source: Path) -> list[VideoItem]:
    rows = csv.reader(_lines(source), strict=True)
    items = []
    try:
        header = [name.strip() for name in next(rows, [])]
        if "path" not in header or len(set(header)) != len(header):
            raise DataError(
                f"{source}: the first line is {','.join(header)!r}; expected a header with the column path, "
                "and label if there are labels",
                hint="put path,label on the first line",
            )
        path_column = header.index("path")
        label_column = header.index("label") if "label" in header else None
        for row in rows:
            if not row:
                continue
            if len(row) != len(header) or not row[path_column].strip():
                raise DataError(
                    f"{source}: line {rows.line_num} is {','.join(row)!r}; expected {len(header)} values for "
                    f"{','.join(header)}",
                    hint="quote a value that contains a comma",
                )
            label = row[label_column].strip() if label_column is not None else ""
            items.append(_item(source, row[path_column].strip(), label))
    except csv.Error as error:
        raise DataError(f"{source}: line {rows.line_num} is not valid csv ({error})") from error
    return items


def _read_text(source: Path) -> list[VideoItem]:
    items = []
    for line in map(str.strip, _lines(source)):
        if not line:
            continue
        # A path may contain blanks: it ends at the first video suffix that a blank or the line's end follows.
        match = _LIST_LINE.fullmatch(line)
        written, label = match.group("path", "label") if match else line.partition(" ")[::2]
        items.append(_item(source, written, label))
    return items


def _item(source: Path, written: str, label: str | None) -> VideoItem:
    return VideoItem(source.parent / written, label or None, written)


def _lines(source: Path) -> list[str]:
    try:
        return source.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{source} cannot be read as text ({error})", hint=f"expected {_FORMATS}") from error


def _some(values: Iterable[str]) -> str:
    values = list(values)
    more = len(values) - _NAMED
    return ", ".join(values[:_NAMED]) + (f" and {more} more" if more > 0 else "")
