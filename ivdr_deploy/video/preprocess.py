"""The one preprocessing: a decoded frame becomes uint8 RGB at the network's size; the network normalises."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

_per_thread = threading.local()


def resized_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side at ``short_side`` and the aspect kept; halves round up."""
    if height <= width:
        return short_side, (2 * width * short_side + height) // (2 * height)
    return (2 * height * short_side + width) // (2 * width), short_side


def resize_frame(frame: av.VideoFrame, size: tuple[int, int], *, rotation: int = 0) -> np.ndarray:
    """Resize a decoded frame and convert it to RGB in one step: the resize named ``swscale-bilinear``.

    FFmpeg's scaler goes from the decoded pixel format to the target in one pass: bilinear (its support widens
    when shrinking, so there is no aliasing), full chroma (without it, even widths go through a coarse colour
    table that is 1 to 2 levels too dark and up to 90 levels off at edges), accurate rounding and the
    bit-exact code path, so that the result does not depend on the processor. Colour matrix and range are
    those that the stream names. Interlaced frames are scaled field by field.

    Args:
        frame: As decoded, any size and pixel format.
        size: (height, width) of the result, as displayed.
        rotation: Degrees counter-clockwise to turn the picture for display: 0, 90, 180 or 270.

    Returns:
        uint8 RGB, shape (height, width, 3).
    """
    from av.video.reformatter import Interpolation

    height, width = size[::-1] if rotation in (90, 270) else size
    out = _reformatter().reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        interpolation=Interpolation.BILINEAR
        | Interpolation.FULL_CHR_H_INT
        | Interpolation.ACCURATE_RND
        | Interpolation.BITEXACT,
        threads=1,
    )
    rgb = out.to_ndarray()
    return np.rot90(rgb, rotation // 90) if rotation else rgb


def crops(frames: np.ndarray, crop_size: int, *, count: int = 1) -> tuple[np.ndarray, ...]:
    """Cut squares out of frames (..., H, W, C), rounding the offsets down.

    Args:
        frames: Of any leading shape.
        crop_size: Side of a square.
        count: 1: the centre. 3: the start, the centre and the end of the longer side, each centred on the other.

    Returns:
        ``count`` views of shape (..., crop_size, crop_size, C).
    """
    spare = [extent - crop_size for extent in frames.shape[-3:-1]]
    middle = [extra // 2 for extra in spare]
    if count == 1:
        offsets = [middle]
    elif spare[0] > spare[1]:
        offsets = [[top, middle[1]] for top in (0, middle[0], spare[0])]
    else:
        offsets = [[middle[0], left] for left in (0, middle[1], spare[1])]
    return tuple(frames[..., top : top + crop_size, left : left + crop_size, :] for top, left in offsets)


def _reformatter() -> VideoReformatter:
    """One scaler per thread: it keeps its filter tables while size and format stay the same."""
    scaler: VideoReformatter | None = getattr(_per_thread, "scaler", None)
    if scaler is None:
        from av.video.reformatter import VideoReformatter

        scaler = _per_thread.scaler = VideoReformatter()
    return scaler
