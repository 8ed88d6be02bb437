"""Frames that are larger than the header says, and pixel formats that nobody can convert."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import pytest
from hostile_mp4 import png

from ivdr_deploy.errors import VideoDecodeError, VideoLimitError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import VideoLimits, load_clips, open_video

CLIP = ClipSpec(num_frames=8, short_side=36, crop_size=32)
LIMITS = VideoLimits(max_pixels=256 * 256)

KINDS = {
    "h264": ("libx264", "mpegts", {"tune": "zerolatency", "x264-params": "log-level=none"}),
    "hevc": ("libx265", "mpegts", {"tune": "zerolatency", "x265-params": "log-level=none"}),
    "mpeg4": ("mpeg4", "avi", {}),
    "mjpeg": ("mjpeg", "avi", {}),
    "vp8": ("libvpx", "matroska", {"lag-in-frames": "0"}),
    "vp9": ("libvpx-vp9", "matroska", {"lag-in-frames": "0"}),
    "png": ("png", "avi", {}),
}


PIXELS = {"mjpeg": "yuvj420p", "png": "rgb24"}


def packets(kind: str, size: tuple[int, int]) -> list[bytes]:
    """Encode four frames, each with all that its decoder must know."""
    if kind == "png":
        return [png(*size)] * 4
    codec, _, options = KINDS[kind]
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = *size, PIXELS.get(kind, "yuv420p")
    encoder.time_base, encoder.framerate, encoder.options = Fraction(1, 25), Fraction(25), options
    encoder.gop_size = 1
    out = []
    for number in range(4):
        frame = av.VideoFrame(*size, encoder.pix_fmt)
        for plane in frame.planes:
            plane.update(bytes([60 + 10 * number]) * plane.buffer_size)
        frame.pts, frame.time_base = number, Fraction(1, 25)
        out += [bytes(packet) for packet in encoder.encode(frame)]
    return out + [bytes(packet) for packet in encoder.encode(None)]


def growing(path: Path, kind: str, sizes: list[tuple[int, int]]) -> Path:
    """Write frames of some sizes, four each, under a header that tells the first."""
    codec, container, options = KINDS[kind]
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = PIXELS.get(kind, "yuv420p")
        stream.codec_context.open()
        number = 0
        for size in sizes:
            for data in packets(kind, size):
                packet = av.Packet(data)
                packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
                packet.time_base = stream.codec_context.time_base
                out.mux(packet)
                number += 1
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_frames_that_grow_beyond_the_limit_are_too_large(kind: str, tmp_path: Path) -> None:
    path = growing(tmp_path / "a.vid", kind, [(64, 64), (512, 512)])
    with pytest.raises(VideoLimitError, match="65536 pixels"):
        load_clips(path, CLIP, ViewPlan(num_clips=1), limits=LIMITS)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_may_grow_within_the_limit(kind: str, tmp_path: Path) -> None:
    path = growing(tmp_path / "a.vid", kind, [(64, 64), (128, 128)])
    clips = load_clips(path, CLIP, ViewPlan(num_clips=1), limits=LIMITS)
    assert clips.info.num_frames >= 7


def test_a_header_that_lies_about_the_size_is_found_before_the_picture_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    picture = png(8000, 8000, depth=16, colour=6)
    with av.open(str(path), "w", format="avi") as out:
        stream = out.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        for number in range(3):
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            out.mux(packet)
    with pytest.raises(VideoLimitError, match="65536 pixels"):
        open_video(path, limits=LIMITS)


@pytest.mark.parametrize("name", ["gray32le", "rgba128be", "y210be", "yaf32le", "yaf32be"])
def test_pixels_that_cannot_be_converted_are_an_error_of_the_video(name: str, tmp_path: Path) -> None:
    path = growing(tmp_path / "a.avi", "mjpeg", [(64, 64)])
    message = f"pixel format {name} cannot be converted"
    with open_video(path) as reader, pytest.raises(VideoDecodeError, match=message):
        reader.to_rgb(av.VideoFrame(64, 64, name), (32, 32))
