"""Looks into files of ``torch.save`` without loading them: for names that reading one would import, at checksums."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.artifacts.archive import ZIP_DAMAGE

_ARCHIVE = b"PK\x03\x04"
"""How a file begins that torch reads as an archive."""

_FOLDER = 0x10
"""Attribute of a member; torch takes memory for such a tensor, and reads nothing into it."""

_OWN = ("torch.", "collections.OrderedDict")
_MAX_BYTES = 64 << 20
"""Of the pickle in an archive; names of tensors take some hundred bytes each."""

_PICKLES = 8
"""In a file of ``torch.save``'s old form there are four, one after the other."""


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


def foreign_name(content: bytes) -> str:
    """Find the first name in a file of ``torch.save``, or in any pickle, that is not torch's own.

    Returns:
        Module and name; empty where none is found, or the file is damaged before it.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
                with archive.open(name) as stored:
                    content = stored.read(_MAX_BYTES)
        stream = io.BytesIO(content)
        for _ in range(_PICKLES):
            _Reader(stream).load()
    except _ForeignNameError as found:
        return str(found)
    except Exception:  # noqa: BLE001 - a damaged file makes its readers raise what they like
        return ""
    return ""


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
