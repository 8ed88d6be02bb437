"""Lists of videos, with or without labels, in every accepted form."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ivdr_deploy._text import quoted
from ivdr_deploy.datasets.entries import FORMATS, VIDEO_SUFFIXES, Entry, LeftOut, Omissions, some
from ivdr_deploy.datasets.folders import read_folder
from ivdr_deploy.datasets.official import Part, hmdb_files, is_ucf, read_hmdb, read_ucf
from ivdr_deploy.datasets.tables import read_csv, read_parquet
from ivdr_deploy.datasets.text import read_text
from ivdr_deploy.errors import ConfigError, DataError
from ivdr_deploy.video.source import PathSource, Source

_NO_LISTS = frozenset({".json", ".jsonl", ".ndjson", ".toml", ".xml", ".yaml", ".yml"})
"""Text files that are no lists, though every line of one would pass for a path."""


@dataclass(frozen=True, slots=True)
class VideoItem:
    """One entry of a list."""

    path: Path
    """Where the file is; it may be absent, see ``VideoList.require_files``."""

    label: str | None
    """Class name, when the list gives one: without blanks around it, in Unicode's composed form (NFC)."""

    uri: str
    """The path as the list writes it; below a folder, relative to it. Valid Unicode, see ``_text.as_text``."""

    group: str | None = None
    """What it shares with other videos, such as the person or the recording, when the list has the column ``group``."""

    @property
    def source(self) -> Source:
        """The video, as decoders take it."""
        return PathSource(self.path)


@dataclass(frozen=True, slots=True)
class VideoList:
    """The videos of one folder or list file, in its order (folders: sorted), each once."""

    source: Path
    items: tuple[VideoItem, ...]
    left_out: tuple[LeftOut, ...] = ()
    """What was passed over, by reason."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that occur, sorted."""
        return tuple(sorted({item.label for item in self.items if item.label is not None}))

    @property
    def data_hash(self) -> str:
        """SHA-256 (hex) over uri, label and file size of every entry (-1: no file that can be looked at)."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(repr((item.uri, item.label, _size(item.path))).encode())
        return digest.hexdigest()

    def require_files(self) -> None:
        """Refuse a list whose files are not all there.

        Raises:
            DataError: naming the first few that are missing, and how many there are.
        """
        missing = [str(item.path) for item in self.items if not os.path.isfile(item.path)]
        if missing:
            raise DataError(
                f"{self.source}: {len(missing)} of {len(self.items)} videos do not exist: {some(missing)}",
                hint="relative paths start at the folder of the list, or at the root that is given",
            )

    def require_labels(self) -> None:
        """Refuse a list in which a video has no label.

        Raises:
            DataError: naming the first few without one.
        """
        bare = [item.uri for item in self.items if item.label is None]
        if bare:
            raise DataError(
                f"{self.source}: {len(bare)} of {len(self.items)} videos have no label: {some(bare)}",
                hint="use a csv with the header path,label, or class folders with no videos beside them",
            )

    def targets(self, labels: Sequence[str]) -> list[int]:
        """Return the position in ``labels`` of every entry's label.

        Raises:
            DataError: if a label is missing, or is not in ``labels``.
        """
        self.require_labels()
        position = {one_spelling(label): i for i, label in enumerate(labels)}
        unknown = [label for label in self.labels if label not in position]
        if unknown:
            known = {alike(label): label for label in labels}
            near = [
                f"{quoted(label)} is {quoted(known[alike(label)])} there"
                for label in unknown
                if alike(label) in known
            ]
            raise DataError(
                f"{self.source}: {len(unknown)} classes are unknown to training: {some(unknown)}",
                hint="; ".join(near[:3]) or f"the {len(labels)} known classes: {some(labels)}",
            )
        return [position[str(item.label)] for item in self.items]


def read_video_list(
    path: str | Path, *, root: str | Path | None = None, part: Part | None = None
) -> VideoList:
    """Read a folder or a list file.

    * a folder with videos in it: those and all below, no labels;
    * a folder without: each folder in it names the class of the videos below it;
    * ``*.csv``, ``*.tsv``: a header line with ``path`` and, if there are labels, ``label``; ``*.parquet``: the same;
    * the official lists of HMDB51, UCF101 and Kinetics, see ``datasets.official``;
    * any other file: text, one ``path`` or ``path label`` a line.

    Whether the files exist is not checked here. A video that is listed again with the same label is one item.

    Args:
        path: The folder or file.
        root: Where the relative paths of a list file start; None: at its folder.
        part: The part that is wanted of a list which holds both training and test; None: both.

    Raises:
        DataError: if nothing is at ``path``, it is none of these, it is empty, it gives a video two labels, or two of
            its labels differ only in case or in the kind of their characters.
        ConfigError: if ``root`` is given for a folder.
    """
    stream = VideoStream(path, root=root, part=part)
    items = [VideoItem(entry.path, entry.label, entry.uri, entry.group) for entry in stream]
    if stream.source.is_dir():  # links came last, so that they are the repeated ones
        items.sort(key=lambda item: item.path)
    return VideoList(stream.source, tuple(items), stream.left_out)


class VideoStream:
    """The videos of a folder or list file one after the other, each once, for lists that no memory should hold.

    Arguments and errors are those of ``read_video_list``, which holds all of it. What is wrong further down in a list
    is raised when it is met there. In a folder, what links lead to comes last.
    """

    def __init__(self, path: str | Path, *, root: str | Path | None = None, part: Part | None = None) -> None:
        self.source = Path(path)
        self._how = self.source, None if root is None else Path(root), part
        self._entries, self._left = read_entries(*self._how)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was passed over so far, by reason."""
        return self._left.found()

    def __iter__(self) -> Iterator[Entry]:
        """Go through the list, once. Labels are spelled as in ``VideoItem``."""
        first: dict[int, str | None] = {}
        spelled: dict[str | None, str | None] = {None: None}
        for entry in self._entries:
            written = entry.label
            if written not in spelled:
                assert written is not None
                spelled[written] = one_spelling(written) or None
            label = spelled[written]
            key = hash(entry.key)  # 64 bits: the text of a million would take 150 MB
            if key not in first:
                first[key] = label
                yield entry if label == written else entry._replace(label=label)
            elif label != first[key]:
                raise self._two_labels(entry, label)
            else:
                self._left.add("repeated", entry.uri)
        if not first:
            passed = "; ".join(map(str, self.left_out))
            raise DataError(
                f"{self.source} holds no videos" + (f" (left out: {passed})" if passed else ""),
                hint=f"expected {FORMATS}",
            )
        _require_distinct(self.source, {label for label in spelled.values() if label is not None})

    def _two_labels(self, entry: Entry, label: str | None) -> DataError:
        """Say which two entries of one file differ; the list is read again up to the first of them."""
        before = next(other for other in read_entries(*self._how)[0] if other.key == entry.key)
        said = [f"{quoted(one_spelling(before.label or ''))} ({before.where or quoted(before.file)})"]
        said.append(f"{quoted(label or '')} ({entry.where or quoted(entry.file)})")
        return DataError(
            f"the labels of one video differ: {quoted(entry.uri)} is {' and '.join(said)}",
            hint="a video has one class: remove one of the two",
        )


def one_spelling(label: str) -> str:
    """Return the one spelling of a label: blanks around it and the form of its characters (NFC) say nothing."""
    return unicodedata.normalize("NFC", label.strip())


def read_entries(source: Path, root: Path | None, part: Part | None) -> tuple[Iterator[Entry], Omissions]:
    """Read a list of any form as it stands there, and count what it passes over, as the entries are asked for.

    Raises:
        DataError: as ``read_video_list``, but not for what only several entries together show.
        ConfigError: as ``read_video_list``.
    """
    left = Omissions()
    if source.name.startswith("*") and (files := hmdb_files(source)):
        return read_hmdb(files, root or source.parent, part, left), left
    try:
        mode = source.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"no list of videos at {source} ({reason})", hint=f"expected {FORMATS}") from error
    if stat.S_ISDIR(mode):
        entries = read_folder(source, left)
        found = next(entries, None)
        if found is None and (files := hmdb_files(source)):
            left = Omissions()
            return read_hmdb(files, root or source, part, left), left
        if root is not None:
            raise ConfigError(f"{source} is a folder of videos; the root {root} is for list files")
        return (iter(()) if found is None else chain([found], entries)), left
    suffix = source.suffix.lower()
    if not stat.S_ISREG(mode):
        raise DataError(f"{source} is neither a file nor a folder", hint=f"expected {FORMATS}")
    if suffix in VIDEO_SUFFIXES:
        raise DataError(f"{source} is a video, not a list of videos", hint=f"expected {FORMATS}")
    if suffix in _NO_LISTS:
        raise DataError(
            f"{source} is a {suffix} file, which is no list of videos", hint=f"expected {FORMATS}"
        )
    return _read_file(source, suffix, root or source.parent, part, left), left


def _read_file(source: Path, suffix: str, root: Path, part: Part | None, left: Omissions) -> Iterator[Entry]:
    if suffix in {".csv", ".tsv"}:
        return read_csv(source, root)
    if suffix == ".parquet":
        return read_parquet(source, root)
    if files := hmdb_files(source):
        return read_hmdb(files, root, part, left)
    return read_ucf(source, root) if is_ucf(source) else read_text(source, root)


def _require_distinct(source: Path, labels: Iterable[str]) -> None:
    """Refuse classes whose names look alike: they are one class, spelled in two ways."""
    found: dict[str, str] = {}
    for label in sorted(labels):
        other = found.setdefault(alike(label), label)
        if other != label:
            raise DataError(
                f"{source}: the classes {quoted(other)} and {quoted(label)} differ only in case or in characters "
                "that look alike",
                hint="spell one class in one way",
            )


def alike(label: str) -> str:
    """Return what two spellings of a label have in common: no case, single blanks, compatible characters."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _size(path: Path) -> int:
    """Return the size of a file; -1 if there is none, or it cannot be looked at."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1
