"""Numbered videos of many codecs and containers, and PyAV's own way through them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from videos import numbered_frame, write_video

from ivdr_deploy.spec import DecoderName
from ivdr_deploy.video.containers import CONTAINER_NAMES
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.reader import VideoLimits

DECODERS: tuple[DecoderName, ...] = ("pyav", "opencv")
NUM_FRAMES = 45
VARIABLE_MS = [40 * k + 35 * (k // 7) for k in range(NUM_FRAMES)]
ALL_CONTAINERS = VideoLimits(containers=CONTAINER_NAMES)

X264, X265 = "keyint=9:scenecut=0:bframes=3", "keyint=9:scenecut=0:bframes=3:log-level=none"
VIDEOS: dict[str, dict[str, object]] = {
    "short_gop.mp4": {"gop": 5},
    "long_gop.mp4": {"gop": 300, "bframes": 4},
    "intra_only.mp4": {"gop": 1, "bframes": 0},
    "open_gop.mp4": {"options": {"x264-params": f"open-gop=1:{X264}"}},
    "gradual_refresh.mp4": {"gop": 20, "bframes": 0, "options": {"intra-refresh": "1"}},
    "h264.mkv": {},
    "h264.mov": {},
    "variable.mp4": {"pts_ms": VARIABLE_MS},
    "variable.mkv": {"pts_ms": VARIABLE_MS},
    "hevc_open_gop.mp4": {"codec": "libx265", "options": {"x265-params": f"open-gop=1:{X265}"}},
    "vp8.webm": {"codec": "libvpx", "bframes": 0},
    "vp9.webm": {"codec": "libvpx-vp9", "bframes": 0},
    "mpeg4.avi": {"codec": "mpeg4", "bframes": 0},
    "mpeg4_bframes.avi": {"codec": "mpeg4"},
    "mpeg4_bframes.mp4": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "bframes": 0, "pix_fmt": "yuvj420p"},
    "h264.avi": {},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "h264.ts": {},
    "h264.flv": {},
    "wmv2.asf": {"codec": "wmv2", "bframes": 0},
    "vp8.ogv": {"codec": "libvpx", "bframes": 0},
    "elementary.h264": {},
    "elementary.hevc": {"codec": "libx265", "options": {"x265-params": X265}},
    "elementary.m2v": {"codec": "mpeg2video"},
    "numbers.gif": {"codec": "gif", "pix_fmt": "gray", "fps": 10},
}


def noisy_frames(count: int) -> Iterator[np.ndarray]:
    noise = np.random.default_rng(0).integers(-30, 30, (64, 200, 3))
    for number in range(count):
        frame = numbered_frame(number, size=(96, 64)) + noise[:, number : number + 96]
        yield frame.clip(0, 255).astype(np.uint8)


def decoded_from_the_start(path: Path) -> list[bytes]:
    """Every frame of a file as RGB bytes, by nothing but PyAV's own loop."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def frame_bytes(path: Path | bytes, indices: list[int]) -> list[bytes]:
    with open_video(path, limits=ALL_CONTAINERS) as reader:
        return [frame.to_ndarray(format="rgb24").tobytes() for _, frame in reader.frames(indices)]


def remux(
    source: Path,
    target: Path,
    *,
    skip: int = 0,
    shift: int = 0,
    options: dict[str, str] | None = None,
    rotation: int | None = None,
) -> Path:
    """Copy the packets of a video, without the first ``skip``, ``shift`` ticks earlier."""
    with av.open(str(source)) as reading, av.open(str(target), "w", options=options or {}) as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for packet in itertools.islice(reading.demux(video=0), skip, None):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                writing.mux(packet)
    return target


def made_video(folder: Path, name: str) -> Path:
    """Make one of ``VIDEOS`` unless it is there: numbers over moving noise, so that each frame matters."""
    path = folder / name
    return path if path.exists() else write_video(path, noisy_frames(NUM_FRAMES), **VIDEOS[name])  # type: ignore[arg-type]
