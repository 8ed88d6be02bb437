"""MP4 files of a few hundred bytes, written box by box, that declare what they like."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence


def box(kind: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind.encode()) + body


def full(kind: str, *parts: bytes, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", flags), *parts)


def numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def png(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    """A black picture; a large one is small as a file."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return numbers(len(body)) + kind + body + numbers(zlib.crc32(kind + body))

    channels = {2: 3, 6: 4}[colour]
    packer, row = zlib.compressobj(9), bytes(1 + width * channels * depth // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


PICTURE = png(64, 64)
FTYP = box("ftyp", b"isom", numbers(512), b"isomiso2mp41")
MATRIX = numbers(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def track(
    *,
    samples: int = 3,
    size: int = len(PICTURE),
    tick: int = 40,
    edits: Sequence[tuple[int, int]] = (),
    handler: bytes = b"vide",
    sizes: bytes | None = None,
    reference_flags: int = 1,
    per_chunk: int | None = None,
    chunk_at: int = len(FTYP) + 8,
    chunks: int = 1,
) -> bytes:
    """A ``trak`` of PNG pictures in one chunk, or in several that all lie at the same place: all frames are one."""
    entry = bytes(6) + numbers(0)[:2] + bytes(16) + struct.pack(">HH", 64, 64)
    entry += numbers(72 << 16, 72 << 16, 0) + struct.pack(">H", 1) + bytes(32) + struct.pack(">Hh", 24, -1)
    entry = entry[:6] + b"\0\1" + entry[8:]
    sound = bytes(6) + b"\0\1" + bytes(8) + struct.pack(">HHHHI", 1, 8, 0, 0, 8000 << 16)
    description = box("raw " if handler == b"soun" else "png ", sound if handler == b"soun" else entry)
    tables = box(
        "stbl",
        full("stsd", numbers(1), description),
        full("stts", numbers(1, samples, tick)),
        full("stsc", numbers(1, 1, per_chunk or samples, 1)),
        sizes if sizes is not None else full("stsz", numbers(size, samples)),
        full("stco", numbers(chunks, *[chunk_at] * chunks)),
    )
    header = full("smhd", bytes(4)) if handler == b"soun" else full("vmhd", bytes(8), flags=1)
    reference = box("dinf", full("dref", numbers(1), full("url ", b"", flags=reference_flags)))
    media = box(
        "mdia",
        full("mdhd", numbers(0, 0, 1000, samples * tick & 0xFFFFFFFF), b"\x55\xc4\0\0"),
        full("hdlr", numbers(0), handler, bytes(12), b"x\0"),
        box("minf", header, reference, tables),
    )
    listed = b"".join(struct.pack(">IiI", length, start, 1 << 16) for length, start in edits)
    head = full(
        "tkhd",
        numbers(0, 0, 1, 0, samples * tick & 0xFFFFFFFF),
        bytes(16),
        MATRIX,
        numbers(64 << 16, 64 << 16),
        flags=7,
    )
    return box(
        "trak", head, *([box("edts", full("elst", numbers(len(edits)), listed))] if edits else []), media
    )


def movie(*tracks: bytes, extra: bytes = b"", media: bytes = 3 * PICTURE) -> bytes:
    head = full(
        "mvhd", numbers(0, 0, 1000, 1000, 1 << 16), b"\1\0", bytes(10), MATRIX, bytes(24), numbers(99)
    )
    return FTYP + box("mdat", media) + box("moov", head, *tracks, extra)


def compressed(*tracks: bytes, padding: int = 0) -> bytes:
    """The same with a compressed header, as QuickTime wrote it."""
    plain = movie(*tracks, extra=box("free", bytes(padding)) if padding else b"")
    begin = plain.index(b"moov") - 4
    header = plain[begin:]
    packed = box("dcom", b"zlib") + box("cmvd", numbers(len(header)), zlib.compress(header, 9))
    return plain[:begin] + box("moov", box("cmov", packed))


def fragmented(samples: int, *, fragments: int = 1) -> bytes:
    """A header without samples, then fragments that each declare some, all of the default size and duration."""
    defaults = full("trex", numbers(1, 1, 40, len(PICTURE), 0))
    empty = track(samples=0)
    begin = movie(empty, extra=box("mvex", defaults))
    run = full("trun", numbers(samples, 76), flags=1)  # the samples lie 76 bytes behind its start
    fragment = box(
        "moof", full("mfhd", numbers(1)), box("traf", full("tfhd", numbers(1), flags=0x020000), run)
    )
    return begin + (fragment + box("mdat", 3 * PICTURE)) * fragments
