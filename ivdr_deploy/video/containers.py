"""Recognise a file by its first bytes, so that FFmpeg is told the container and never guesses.

Guessing would let a picture or playlist named ``.mp4`` through, and reach parsers that nobody meant to open.
"""

from __future__ import annotations

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import NoVideoStreamError, VideoOpenError

HEAD_BYTES = 1024
"""How much of a file ``sniff_container`` needs."""

DEFAULT_CONTAINERS = ("mov", "matroska", "avi", "gif", "mpeg", "mpegts", "npz")
"""Opened unless the limits say otherwise: those that were tortured with damaged files. ``npz`` is no container of
FFmpeg but frames and their times, see ``frame_array``."""

CONTAINER_NAMES = (*DEFAULT_CONTAINERS, "flv", "asf", "ogg", "h264", "hevc", "mpegvideo", "m4v")
"""Every container that can be allowed, by FFmpeg's name. ``mov`` is also mp4, ``matroska`` also webm, ``asf`` also wmv,
``ogg`` also ogv. The last four are elementary streams: a codec's own bytes (MPEG-1 and MPEG-2 are ``mpegvideo``, MPEG-4
part 2 is ``m4v``), without times; FFmpeg takes 25 frames a second where the codec does not say."""

_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")
_PREFIXES = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"FLV\x01", "flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"OggS", "ogg"),
    (b"PK\x03\x04", "npz"),
    (b"\x00\x00\x01\xb3", "mpegvideo"),
    (b"\x00\x00\x01\xb0", "m4v"),
    (b"\x00\x00\x01\x00", "m4v"),
)
_H264_UNITS = (6, 7, 9)
"""What an H.264 stream begins with, by the lowest five bits of its first unit: messages, parameters, a delimiter."""

_HEVC_UNITS = (32, 33, 35, 39)
"""The same for HEVC, by six bits further up: parameters, a delimiter, messages."""

_NOT_VIDEO = (
    (b"ID3", "an MP3 sound file"),
    (b"\xff\xfb", "an MP3 sound file"),
    (b"\xff\xf3", "an MP3 sound file"),
    (b"\xff\xf1", "an AAC sound file"),
    (b"\xff\xf9", "an AAC sound file"),
    (b"fLaC", "a FLAC sound file"),
    (b"FWS", "a Flash file"),
    (b"CWS", "a Flash file"),
    (b"ZWS", "a Flash file"),
)


def sniff_container(head: bytes, *, name: str) -> str:
    """Name the container of a file.

    Args:
        head: The first ``HEAD_BYTES`` of the file, or all of a shorter one.
        name: The file's name, for messages.

    Raises:
        NoVideoStreamError: if it is a kind of file that holds sound and no pictures.
        VideoOpenError: if it is empty, or no video container that is known here.
    """
    if not head:
        raise VideoOpenError(
            f"{name} is empty (0 bytes)", hint="check that the file was written or sent completely"
        )
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[4:8] in _MOV_ATOMS:
        return "mov"
    for prefix, container in _PREFIXES:
        if head.startswith(prefix):
            return container
    if _is_transport_stream(head):
        return "mpegts"
    if stream := _elementary_stream(head):
        return stream
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        raise NoVideoStreamError(f"{name} is a WAVE sound file: it has no pictures", hint="send a video file")
    for prefix, kind in _NOT_VIDEO:
        if head.startswith(prefix):
            raise NoVideoStreamError(f"{name} is {kind}: no video stream in it", hint="send a video file")
    raise VideoOpenError(
        f"{name} is not a video file: it begins with {quoted(head[:12])}, which is no known video container",
        hint=f"known containers: {', '.join(CONTAINER_NAMES)}",
    )


def _is_transport_stream(head: bytes) -> bool:
    """Whether every packet in ``head`` has its sync byte: 188 bytes each, or 192 with a time code first."""
    return any(
        len(head) >= first + 4 * size and all(byte == 0x47 for byte in head[first::size])
        for first, size in ((0, 188), (4, 192))
    )


def _elementary_stream(head: bytes) -> str | None:
    """Tell H.264 from HEVC by the unit after the first start code; None if there is no start code, or another unit."""
    start = 4 if head.startswith(b"\x00\x00\x00\x01") else 3
    if head[:start] not in (b"\x00\x00\x00\x01", b"\x00\x00\x01") or len(head) < start + 2:
        return None
    first, second = head[start], head[start + 1]
    if first & 0x80:  # set in no unit
        return None
    if (first >> 1) & 0x3F in _HEVC_UNITS and not first & 1 and second == 1:
        return "hevc"
    return "h264" if first & 0x1F in _H264_UNITS else None
