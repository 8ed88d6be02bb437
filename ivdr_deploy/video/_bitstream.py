"""The few facts about encoded packets that containers do not tell reliably, read without decoding."""

from __future__ import annotations

import re

_INTRA_ONLY = frozenset(
    {"mjpeg", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "prores", "dnxhd", "dvvideo", "v210", "png"}
)
_TRUSTED_KEY_FLAGS = frozenset({"vp9", "av1"})
_VOP = re.compile(rb"\x00\x00\x01\xb6(.)", re.DOTALL)
_START_CODE = re.compile(rb"\x00\x00\x01(..)", re.DOTALL)
_LARGEST_PLACEHOLDER = 19
"""Bytes of the largest MPEG-4 packet that may stand for a frame without coding one (FFmpeg's own bound)."""


def is_entry_point(codec: str, packet: bytes, extradata: bytes) -> bool:
    """Whether a packet that its container calls a key frame is one from which decoding is exact.

    Exact means: its frame, and every frame displayed after it, come out as they do when decoding from the start.
    Key frame flags promise less: x264 sets them on recovery points, too, whose own frame is not whole yet. A codec
    that is not known here never qualifies.
    """
    if codec in _INTRA_ONLY or codec in _TRUSTED_KEY_FLAGS:
        return True
    if codec == "h264":
        return any(unit[0] & 0x1F == 5 for unit in _nal_units(packet, extradata, length_size_at=4))
    if codec == "hevc":  # types 16 to 21: what is displayed after such a picture refers to nothing before it
        units = _nal_units(packet, extradata, length_size_at=21)
        return any(16 <= unit[0] >> 1 & 0x3F <= 21 for unit in units)
    if codec == "vp8":
        return bool(packet) and not packet[0] & 1
    if codec == "mpeg4":
        vop = _VOP.search(packet)
        return vop is not None and vop.group(1)[0] >> 6 == 0
    return False


def temporal_layer(codec: str, packet: bytes, extradata: bytes) -> tuple[int, bool]:
    """Tell which frames may refer to that of a packet.

    Returns:
        Its temporal layer (0 for a codec without layers), and whether surely no other frame of this layer refers to
        it. Such a frame of the highest layer can be left out without changing any other.
    """
    if codec == "h264":
        types = [(unit[0] & 0x1F, unit[0] & 0x60) for unit in _nal_units(packet, extradata, length_size_at=4)]
        slices = [importance for kind, importance in types if kind in (1, 5)]
        plain = all(kind in (1, 6, 9, 12) for kind, _ in types)  # slices, messages, delimiters, filler
        return 0, plain and bool(slices) and not any(slices)
    if codec == "hevc":
        units = _nal_units(packet, extradata, length_size_at=21)
        types = [(unit[0] >> 1 & 0x3F, (unit[1] & 7) - 1) for unit in units]
        pictures = [(kind, layer) for kind, layer in types if kind < 32]
        plain = all(kind < 32 or kind in (35, 38, 39, 40) for kind, _ in types)
        free = plain and bool(pictures) and all(kind < 16 and kind % 2 == 0 for kind, _ in pictures)
        return max((layer for _, layer in pictures), default=0), free
    return 0, False


def is_hidden(codec: str, packet: bytes) -> bool:
    """Whether a packet holds a frame that is never displayed: VP8 stores its reference-only frames so."""
    return codec == "vp8" and bool(packet) and not packet[0] & 0x10


def is_one_frame(codec: str, packet: bytes) -> bool:
    """Whether a packet gives exactly one frame, at once: then counting packets in an AVI file counts frames.

    Xvid and DivX pack two frames into one AVI packet and put a placeholder where the second belongs, so with
    B-frames neither the number nor the times of AVI packets are those of the frames.
    """
    if codec != "mpeg4":
        return codec in _INTRA_ONLY
    vops = _VOP.findall(packet)
    return len(vops) == 1 and vops[0][0] >> 6 in (0, 1) and len(packet) > _LARGEST_PLACEHOLDER


def _nal_units(packet: bytes, extradata: bytes, *, length_size_at: int) -> list[bytes]:
    """First two bytes of every NAL unit, whether units follow start codes or lengths (as the extradata says)."""
    if not (len(extradata) > length_size_at and extradata[0] == 1):
        return _START_CODE.findall(packet)
    size = (extradata[length_size_at] & 3) + 1
    units, at = [], 0
    while at + size + 1 < len(packet):
        units.append(packet[at + size : at + size + 2])
        at += size + int.from_bytes(packet[at : at + size], "big")
    return units
