"""Small pictures of videos for a page. Decode workers import this module: nothing here needs torch."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from ivdr_deploy.decoding import DecodeOptions, DecodePool
from ivdr_deploy.errors import VideoError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import PathSource, Source, VideoLimits
from ivdr_deploy.video.clips import load_clips

_FRAMES = 4
_SIDE = 112


def clip_strips(
    paths: Sequence[Path], clip: ClipSpec, *, decode: DecodeOptions | None = None, limits: VideoLimits
) -> list[list[str] | VideoError]:
    """Show the middle clip of videos as the network sees it.

    Args:
        paths: The videos.
        clip: The contract.
        decode: The decode workers.
        limits: What a video may cost.

    Returns:
        For every video some of its frames in time order, as data URLs of JPEG pictures; or why there are none.
    """
    with DecodePool(decode) as pool:
        return list(pool.each(clip_strip, ((PathSource(path), clip) for path in paths), limits=limits))


def clip_strip(source: Source, /, clip: ClipSpec, *, limits: VideoLimits) -> list[str]:
    """Return some frames of the middle clip of one video as data URLs: a job of the decode workers.

    Raises:
        VideoError: if the video cannot be used.
    """
    (frames,) = load_clips(source, clip, ViewPlan(num_clips=1), limits=limits).video
    chosen = np.unique(np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int))
    return [_data_url(frames[row]) for row in chosen]


def _data_url(picture: np.ndarray) -> str:
    """Encode uint8 RGB (H, W, 3) as JPEG, no larger than a page shows it."""
    import av
    from av.video.frame import VideoFrame

    height, width = (min(side, _SIDE) // 2 * 2 for side in picture.shape[:2])
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame = frame.reformat(width=width, height=height, format="yuvj420p")
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"qscale": "4"}
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    return "data:image/jpeg;base64," + base64.b64encode(b"".join(map(bytes, packets))).decode("ascii")
