"""The archive (``.mar``): what TorchServe unpacks and executes, with a list of the digests of all that is in it.

The list is a seal against changes, not a signature: whoever can write the archive can also write the list.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn, cast

from ivdr_deploy._files import NO_SPACE, scratch_folder, sha256_file
from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import ArtifactError

BUNDLE_FOLDER = "bundle"
"""Where the bundle lies inside the archive; the worker looks for it there."""

LIST_FILE = "ivdr-files.json"
"""Name of every other member of the archive, and its SHA-256."""

PACK_AGAIN = "make it again with `ivdr archive BUNDLE`"

ZIP_DAMAGE = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
    struct.error,
)
"""All of what zipfile raises for damage; NotImplementedError and RecursionError are RuntimeErrors."""

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip member: the lengths of its name and of its extra field, which follow."""


def seal_archive(path: Path) -> None:
    """Add the list of digests to an archive that has just been made."""
    with zipfile.ZipFile(path, "a") as archive:
        files = {info.filename: _digest(archive, info) for info in archive.infolist()}
        archive.writestr(LIST_FILE, _render(files))


@contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive of which every byte that is executed or read has been checked.

    Raises:
        ArtifactError: if it is no archive of ours, or something in it is missing, changed or added; names the file.
        OSError: if the block fills a disk.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check(path, archive)
            yield archive
    except ArtifactError:
        raise
    except ZIP_DAMAGE as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        raise ArtifactError(
            f"{path} cannot be read as an archive ({reason_of(error, most=100)})", hint=PACK_AGAIN
        ) from error


@contextmanager
def unpacked_bundle(path: Path) -> Iterator[Path]:
    """Unpack the bundle of an archive for as long as the block runs; see ``opened_archive``.

    Raises:
        ArtifactError: as ``opened_archive``.
        OSError: if it cannot be unpacked; when the disk is full, it names the temporary folder of the system.
    """
    with scratch_folder(f"ivdr-{path.name[:60]}-") as folder:
        with opened_archive(path) as archive:
            for name in archive.namelist():
                if name.startswith(f"{BUNDLE_FOLDER}/") and not name.endswith("/"):
                    archive.extract(name, folder)
        yield folder / BUNDLE_FOLDER


def check_unpacked(folder: Path) -> None:
    """Check the folder that an archive was unpacked into, the files of its bundle aside: opening it checks those.

    What Python has executed before this is called, TorchServe's loading of the handler, cannot be stopped by it.

    Raises:
        ArtifactError: if a file is missing, changed or added; names it.
    """
    try:
        listed = _parse((folder / LIST_FILE).read_bytes(), where=str(folder))
    except OSError as error:
        raise ArtifactError(
            f"{folder}: {LIST_FILE} cannot be read ({error.strerror})", hint=PACK_AGAIN
        ) from error
    found = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if not file.is_dir() and "__pycache__" not in file.parts  # the handler's, which was just imported
    }
    _compare(str(folder), {name for name in listed if not name.endswith("/")}, found - {LIST_FILE})
    for name in found - {LIST_FILE}:
        if not name.startswith(f"{BUNDLE_FOLDER}/") and sha256_file(folder / name) != listed[name]:
            _refuse(str(folder), f"{quoted(name)} was changed")


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in members:
            # Of two, Python reads the one that the directory names last, TorchServe the one that lies last.
            _refuse(str(path), f"it holds {quoted(info.filename)} twice")
        members[info.filename] = info
    if LIST_FILE not in members:
        _refuse(
            str(path),
            f"it has no {LIST_FILE}, so it is not an archive of `ivdr archive`, or of a former version",
        )
    _check_layout(path, archive)
    listed = _parse(archive.read(LIST_FILE), where=str(path))
    _compare(str(path), set(listed), set(members) - {LIST_FILE})
    for name, digest in listed.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            _refuse(str(path), f"{quoted(name)} would lie outside the folder that it is unpacked into")
        if _digest(archive, members[name]) != digest:
            _refuse(str(path), f"{quoted(name)} was changed: its SHA-256 is not the one in {LIST_FILE}")


def _check_layout(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse anything between the members, and what is compressed.

    TorchServe reads an archive from front to back. It would also find members that the directory at the end, which is
    what Python reads, does not name.
    """
    stream, end = cast("BinaryIO", archive.fp), 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        stream.seek(end)
        lengths = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
        plain = (
            info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 0x9
        )  # encrypted, length behind
        if info.header_offset != end or not plain:
            _refuse(str(path), f"{quoted(info.filename)} is not stored as `ivdr archive` stores it")
        end += _LOCAL_HEADER.size + sum(lengths) + info.compress_size
    if end != archive.start_dir:
        _refuse(str(path), "it holds something that its directory does not list")


def _compare(where: str, listed: set[str], found: set[str]) -> None:
    if missing := sorted(listed - found):
        _refuse(where, f"{quoted(missing[0])} is missing")
    if added := sorted(found - listed):
        _refuse(where, f"{quoted(added[0])} was added")


def _digest(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    with archive.open(info) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # a binary stream


def _render(files: dict[str, str]) -> bytes:
    return json.dumps(files, indent=1, sort_keys=True).encode()


def _parse(text: bytes, *, where: str) -> dict[str, str]:
    try:
        files = json.loads(text)
    except (ValueError, RecursionError):
        files = None
    if not isinstance(files, dict) or _render(files) != text:
        _refuse(where, f"{LIST_FILE} was changed")
    return files


def _refuse(where: str, reason: str) -> NoReturn:
    raise ArtifactError(f"{where}: {reason}", hint=PACK_AGAIN)
