"""What an MP4 declares, held against the limits before FFmpeg believes it.

FFmpeg makes an index entry of every sample that a header declares, and a header declares any number of them in a few
bytes: 700 bytes can cost gigabytes. Here the boxes are walked and their counts are read, nothing else. What this walk
does not know meets the memory limit of a decode worker.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ivdr_deploy.errors import VideoLimitError, VideoOpenError

_ENTRIES_PER_FRAME = 16
"""Index entries, of all tracks and edits together, for each frame of ``max_frames``: sound and sensors have more of
them than pictures. At the defaults that is 4 million, for which FFmpeg takes about 150 MB."""

_BOXES_PER_FRAME = 3
"""Boxes for each frame of ``max_frames``; a fragment has some eight. At the defaults they take about a second."""

_ALWAYS = 1 << 16
"""Entries and boxes that are allowed whatever the limit on frames."""

_MAX_HEADER_BYTES = 32 << 20
"""Of a compressed header, unpacked. A frame takes some 30 bytes of a header."""

_MAX_DEPTH = 10
"""FFmpeg reads no deeper."""

_SOUND_PER_ENTRY = 160
"""Of plain sound FFmpeg puts so many samples, or more, into one index entry."""

_LEAVES = frozenset({b"mdat", b"ftyp"})
_TABLES = frozenset(
    {b"stsz", b"stz2", b"stts", b"stsc", b"stco", b"co64", b"elst", b"trun", b"hdlr", b"dref", b"cmov"}
)


def check_declared(stream: BinaryIO, *, name: str, max_frames: int) -> None:
    """Walk the boxes of an MP4 or QuickTime file.

    Args:
        stream: The file.
        name: For messages.
        max_frames: The limit on frames; the others follow from it.

    Raises:
        VideoLimitError: if it declares more samples, boxes or bytes of header than the limits allow.
        VideoOpenError: if it says that its pictures lie in another file.
        OSError: if it cannot be read.
    """
    walk = _Walk(name, max_frames)
    walk.boxes_in(stream, 0, stream.seek(0, io.SEEK_END), depth=0)
    walk.end_track()


@dataclass(slots=True)
class _Track:
    """What one ``trak`` declares."""

    samples: int = 0
    chunks: int = 0
    samples_per_chunk: int = 0
    edits: int = 0
    one_size: bool = False
    one_tick: bool = False
    handlers: frozenset[bytes] = frozenset()

    @property
    def entries(self) -> int:
        """Entries that its index may get; each edit may take all samples."""
        sound = b"soun" in self.handlers and b"vide" not in self.handlers
        plain = sound and self.one_size and self.one_tick
        count = self.chunks * self.samples_per_chunk // _SOUND_PER_ENTRY if plain else self.samples
        return count * max(1, self.edits)


class _Walk:
    def __init__(self, name: str, max_frames: int) -> None:
        self._name = name
        self._max_frames = max_frames
        self._track = _Track()
        self._entries = 0
        self._boxes = 0

    def boxes_in(self, stream: BinaryIO, start: int, end: int, *, depth: int) -> None:
        """Visit the boxes between two places of a file, and those inside them.

        Boxes of unknown kinds are looked into as well: where FFmpeg looks depends on the box around them.
        """
        while start + 8 <= end and depth <= _MAX_DEPTH:
            stream.seek(start)
            head = stream.read(16)
            size, kind, body = int.from_bytes(head[:4]), head[4:8], start + 8
            if size == 1:
                size, body = int.from_bytes(head[8:]), start + 16
            stop = min(start + size, end) if size else end  # 0: to the end of what is around it
            if stop < body:
                return
            self._boxes += 1
            if self._boxes > (limit := _ALWAYS + _BOXES_PER_FRAME * self._max_frames):
                raise self._too_much(f"has more than {limit} boxes")
            if kind in _TABLES:
                stream.seek(body)
                self._read_table(kind, stream, stop - body, depth)
            elif kind not in _LEAVES:
                if kind == b"trak":
                    self.end_track()
                # A "meta" of ISO has four bytes before its first child, one of Apple has not.
                shift = 4 if kind == b"meta" and head[12:] != b"hdlr" else 0
                if body + shift + 8 <= stop:
                    self.boxes_in(stream, body + shift, stop, depth=depth + 1)
            start = stop

    def end_track(self) -> None:
        """Hold the track read last against the limits."""
        track, self._track = self._track, _Track()
        if b"vide" in track.handlers and track.samples > self._max_frames:
            raise self._too_much(
                f"has more than {self._max_frames} frames, the limit: it declares {track.samples}"
            )
        self._count(track.entries)

    def _read_table(self, kind: bytes, stream: BinaryIO, length: int, depth: int) -> None:
        track = self._track
        head = stream.read(min(length, 16)).ljust(16, b"\0")
        first, second, third = (int.from_bytes(head[at : at + 4]) for at in (4, 8, 12))
        if kind == b"stsz":
            track.one_size = first > 0
            track.samples += second
        elif kind == b"stz2":
            track.samples += second
        elif kind == b"stts":
            track.one_tick = first == 1 and third == 1
        elif kind in (b"stco", b"co64"):
            track.chunks += first
        elif kind == b"stsc":
            self._count(first)
            rows = head[8:] + stream.read(max(0, min(12 * first, length - 8) - 8))
            runs = np.frombuffer(rows, ">u4", len(rows) // 12 * 3).reshape(-1, 3)[:, 1]
            track.samples_per_chunk = max(track.samples_per_chunk, int(runs.max(initial=0)))
        elif kind == b"elst":
            track.edits += first
        elif kind == b"trun":
            self._count(first)
        elif kind == b"hdlr":
            track.handlers |= {head[8:12]}
        elif kind == b"dref":
            self._check_reference(head[12:] + stream.read(max(0, min(length - 16, 4))))
        else:
            self._unpack(head + stream.read(max(0, min(length - 16, _MAX_HEADER_BYTES))), depth)

    def _check_reference(self, entry: bytes) -> None:
        """Look at the first entry of a list of data files, from its name on: the last flag means "this file"."""
        if entry[:4] in (b"url ", b"urn ") and len(entry) == 8 and not entry[7] & 1:
            raise VideoOpenError(
                f"{self._name} says that its pictures lie in another file",
                hint="send the pictures themselves",
            )

    def _unpack(self, body: bytes, depth: int) -> None:
        """Walk a compressed header: the method, then a "cmvd" with the unpacked size and the data."""
        place = body.find(b"cmvd")
        if place < 0:
            return
        unpacker = zlib.decompressobj()
        try:
            header = unpacker.decompress(body[place + 8 :], _MAX_HEADER_BYTES)
        except zlib.error:
            return  # FFmpeg will say so
        declared = int.from_bytes(body[place + 4 : place + 8])
        if unpacker.unconsumed_tail or declared > _MAX_HEADER_BYTES:
            raise self._too_much(f"has a compressed header of more than {_MAX_HEADER_BYTES >> 20} MiB")
        self.boxes_in(io.BytesIO(header), 0, len(header), depth=depth + 1)

    def _count(self, entries: int) -> None:
        self._entries += entries
        if self._entries > (limit := _ALWAYS + _ENTRIES_PER_FRAME * self._max_frames):
            raise self._too_much(
                f"declares {self._entries} samples or more, with edits, the limit is {limit}"
            )

    def _too_much(self, what: str) -> VideoLimitError:
        return VideoLimitError(f"{self._name} {what}", hint="send a shorter video, or raise max_frames")
