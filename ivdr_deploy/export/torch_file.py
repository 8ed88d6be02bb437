"""Looks into files of ``torch.save`` without loading them.

For what would make reading one endless, for names that it would import, at checksums.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from typing import IO, Any

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.artifacts.archive import ZIP_DAMAGE
from ivdr_deploy.export.pickle_scan import require_bounded

_ARCHIVE = b"PK\x03\x04"
"""How a file begins that torch reads as an archive."""

_FOLDER = 0x10
"""Attribute of a member; torch takes memory for such a tensor, and reads nothing into it."""

_OWN = ("torch.", "collections.OrderedDict")
_MAX_BYTES = 64 << 20
"""Of the pickle in an archive; names of tensors take some hundred bytes each."""

_PICKLES = 5
"""In a file of ``torch.save``'s old form, one after the other; the numbers of the tensors follow."""


class _Inert:
    """Stands for whatever a name of torch would be, and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, _: object, __: object) -> None: ...


class _ForeignNameError(Exception):
    """A name that is not torch's own."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if not f"{module}.{name}".startswith(_OWN):
            raise _ForeignNameError(f"{module}.{name}")
        return _Inert

    def persistent_load(self, _: Any) -> _Inert:
        return _Inert()


def require_readable(content: bytes) -> None:
    """Look through all pickles that torch would read.

    Raises:
        CheckpointError: if that would take memory or time without end.
        ValueError: if one is damaged or absent; so does whatever else a damaged file makes its readers raise.
    """
    for stream in _pickles(content):
        require_bounded(stream)


def foreign_name(content: bytes) -> str:
    """Find the first name in a file of ``torch.save``, or in any pickle, that is not torch's own.

    Returns:
        Module and name; empty where none is found, or a pickle is damaged.
    """
    try:
        for stream in _pickles(content):
            start = stream.tell()
            require_bounded(stream)
            stream.seek(start)
            _Reader(stream).load()
    except _ForeignNameError as found:
        return str(found)
    except Exception:  # noqa: BLE001 - a damaged file makes its readers raise what they like
        return ""
    return ""


def _pickles(content: bytes) -> Iterator[IO[bytes]]:
    """Yield a stream at the beginning of each pickle: of the members of an archive that torch may take for its own."""
    if not content.startswith(_ARCHIVE):
        stream = io.BytesIO(content)
        for _ in range(_PICKLES):
            yield stream
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # In capitals it is taken as well.
        names = [name for name in archive.namelist() if name.lower().endswith("data.pkl")]
        if not names:
            raise ValueError("it holds no data.pkl")
        for name in names:
            with archive.open(name) as stored:
                yield io.BytesIO(stored.read(_MAX_BYTES))


def is_packed(content: bytes) -> bool:
    """Say whether an archive unpacks to more bytes than it has; torch packs nothing, and would unpack any amount."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return sum(info.file_size for info in archive.infolist()) > len(content)
    except ZIP_DAMAGE:
        return False


def damage(content: bytes) -> str:
    """Say what is wrong with an archive: torch looks at no checksum, and reads over much else.

    Returns:
        Empty where all is right, or the file is no archive to torch, as its old form is none.
    """
    if not content.startswith(_ARCHIVE):
        return ""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            folders = [info.filename for info in archive.infolist() if info.external_attr & _FOLDER]
            name = archive.testzip()
    except ZIP_DAMAGE as error:
        return reason_of(error)
    if folders:
        return f"{quoted(folders[0])} in it is marked as a folder"
    return f"{quoted(name)} in it does not have its checksum" if name else ""
