"""The lists that data sets are published with: HMDB51, UCF101 and Kinetics."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ivdr_deploy._text import as_text, quoted
from ivdr_deploy.datasets.entries import Entry, Omissions, Root, changing, listed, open_text, some
from ivdr_deploy.datasets.text import read_text
from ivdr_deploy.errors import DataError

Part = Literal["train", "test"]
"""The part of a list that holds both; other lists have but one part."""

CLASS_INDEX = "classInd.txt"
_HMDB = re.compile(r"(?P<label>.+)_test_split(?P<split>\d+)\.txt")
_UCF = re.compile(r"(?:train|test)list\d+\.txt", re.IGNORECASE)
_HMDB_USE: dict[str, Part | None] = {"0": None, "1": "train", "2": "test"}
_KINETICS = {"youtube_id", "time_start", "time_end"}
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+")
_CLASS_NUMBER = re.compile(r"[0-9]{1,9}")


class ClassFolders:
    """Places files that a list names without a folder: in the folder of their class, where there is one."""

    def __init__(self, root: Path) -> None:
        self._root = Root(root)
        self._known: dict[str, bool] = {}

    def entry(self, name: str, label: str | None, place: str, number: int) -> Entry:
        """Make the entry of one file."""
        if label is not None and label not in self._known:
            self._known[label] = os.path.isdir(self._root.path / label)  # never raises, whatever the name
        inside = label is not None and self._known[label]
        return listed(self._root, f"{label}/{name}" if inside else name, label, place, number)


def hmdb_files(source: Path) -> list[Path]:
    """Return HMDB51's ``CLASS_test_splitN.txt`` that ``source`` stands for; none if it is something else.

    ``source`` is one such file, ``*_test_splitN.txt`` for those of all classes, or a folder that holds those of one
    split.

    Raises:
        DataError: if a folder holds the files of several splits.
    """
    if source.is_dir():
        matches = [
            (path, match) for path in sorted(source.iterdir()) if (match := _HMDB.fullmatch(path.name))
        ]
        splits = sorted({match["split"] for _, match in matches})
        if len(splits) > 1:
            raise DataError(
                f"{source} holds the splits {some(splits)} of HMDB51; expected one",
                hint=f"choose one by its name: '{source}/*_test_split{splits[0]}.txt'",
            )
        return [path for path, _ in matches]
    if source.name.startswith("*") and _HMDB.fullmatch(source.name):
        found = sorted(source.parent.iterdir()) if source.parent.is_dir() else []
        return [path for path in found if _HMDB.fullmatch(path.name) and fnmatchcase(path.name, source.name)]
    return [source] if _HMDB.fullmatch(source.name) else []


def read_hmdb(files: Collection[Path], root: Path, part: Part | None, left: Omissions) -> Iterator[Entry]:
    """Yield the videos of HMDB51 that a split uses, or the training or test part of them.

    Each file is of one class, which its name says; its lines are ``name 1`` (training), ``name 2`` (test) and
    ``name 0`` (not used).

    Raises:
        DataError: if a line is none of these.
    """
    folders = ClassFolders(root)
    for file in files:
        match = _HMDB.fullmatch(file.name)
        assert match is not None, "hmdb_files chose it"
        with open_text(file) as lines:
            for number, line in enumerate(lines, start=1):
                words = line.split(None)
                if not words:
                    continue
                if len(words) != 2 or words[1] not in _HMDB_USE:
                    raise DataError(
                        f"{file}: line {number} is {quoted(line.strip())}; expected a name and 0, 1 (training) or "
                        "2 (test), as in the splits of HMDB51",
                        hint="give a list of another form another name",
                    )
                name, use = words[0], _HMDB_USE[words[1]]
                if use is None or part not in (None, use):
                    left.add("not used by the split" if use is None else f"of the {use} part", as_text(name))
                    continue
                yield folders.entry(name, as_text(match["label"]), f"{file}: line", number)


def is_ucf(source: Path) -> bool:
    """Whether a text list is of the form of UCF101: by its name, or a class index beside it."""
    return _UCF.fullmatch(source.name) is not None or (source.parent / CLASS_INDEX).is_file()


def read_ucf(source: Path, root: Path) -> Iterator[Entry]:
    """Yield the videos of UCF101's ``trainlist`` or ``testlist``: ``Class/name.avi 1``, or without the number.

    The numbers count from 1 in ``classInd.txt`` beside the list; without a number the folder is the class. A list
    with labels of another kind is taken as it is.

    Raises:
        DataError: if a number is not in the index, or the folder is another class than the number says.
    """
    # Read twice, since it may be too long to be held.
    if not all(map(_is_ucf_entry, read_text(source, root))):
        yield from read_text(source, root)
        return
    index = source.parent / CLASS_INDEX
    indexed = index.is_file()
    names = class_names(index) if indexed else {}
    for entry in read_text(source, root):
        if not _is_ucf_entry(entry):
            raise changing(source)
        number = None if entry.label is None else str(int(entry.label))
        folder = entry.path.parent.name if "/" in entry.uri else None
        if number is not None and not indexed and folder and folder not in names.values():
            names.setdefault(number, folder)
        label = folder if number is None else names.get(number)
        if label is None or (indexed and label not in names.values()):
            raise DataError(
                f"{entry.where}: the class {quoted(label or number or '')} is not in {index}",
                hint="the numbers count from 1 there; without a number, the folder of a video is its class",
            )
        if folder is not None and folder != label and (not indexed or folder in names.values()):
            raise DataError(
                f"{entry.where}: class {number} is {quoted(label)}, and the folder is {quoted(folder)}",
                hint=f"{CLASS_INDEX} beside the list says which number is which class",
            )
        yield entry._replace(label=label)


def _is_ucf_entry(entry: Entry) -> bool:
    return entry.label is None or _CLASS_NUMBER.fullmatch(entry.label) is not None


def is_kinetics(header: Collection[str]) -> bool:
    """Whether a csv has the columns of Kinetics, and no paths."""
    return set(header) >= _KINETICS and "path" not in header


def kinetics_entry(folders: ClassFolders, values: Mapping[str, str], place: str, number: int) -> Entry | None:
    """Make the entry of one line; the file is named ``ID_START_END.mp4``. None if a time is no number."""
    times = [values["time_start"].strip(), values["time_end"].strip()]
    if not values["youtube_id"] or not all(map(_SECONDS.fullmatch, times)):
        return None
    start, end = (int(float(time)) for time in times)
    label = values.get("label", "").strip() or None
    return folders.entry(f"{values['youtube_id']}_{start:06d}_{end:06d}.mp4", label, place, number)


def class_names(index: Path) -> dict[str, str]:
    """Read ``classInd.txt``: ``1 ApplyEyeMakeup`` a line; number -> class.

    Raises:
        DataError: if a line is something else, or a number or class comes twice.
    """
    names: dict[str, str] = {}
    with open_text(index) as lines:
        for place, line in enumerate(lines, start=1):
            number, *rest = line.split(None, 1)[:2] or [""]
            if not number:
                continue
            if not _CLASS_NUMBER.fullmatch(number) or not rest or str(int(number)) in names:
                raise DataError(
                    f"{index}: line {place} is {quoted(line.strip())}; expected a number of its own and a class",
                )
            names[str(int(number))] = rest[0].strip()
    repeated = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if repeated:
        raise DataError(f"{index} names classes twice: {some(repeated)}")
    return names
