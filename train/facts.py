"""What a video shows when all of it is decoded. Decode workers import this module: nothing here needs torch."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import numpy as np

from ivdr_deploy.errors import VideoOpenError
from ivdr_deploy.spec import ClipSpec
from ivdr_deploy.video import Source, VideoLimits, open_frames
from ivdr_deploy.video.decode import open_video
from train.frames import Form, encoded, made_with

_SIDE = 32
"""Side of the small pictures that tell contents apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFacts:
    """One video, decoded from its first frame to its last."""

    num_frames: int
    fps: float
    variable_frame_rate: bool
    width: int
    height: int
    content: str
    """SHA-256 over small pictures of all frames: the same for copies, also those with another name, container or
    metadata, but not for a video that was encoded again."""

    still: bool
    """Whether all frames show the same."""


def look_at(source: Source, /, *, limits: VideoLimits) -> VideoFacts:
    """Decode every frame of a video, holding one at a time: a job of the decode workers.

    Raises:
        VideoError: if it cannot be used.
    """
    try:
        source.open().close()
    except OSError as error:  # before the decoder, whose message would not say why
        raise VideoOpenError(f"{source.uri} cannot be read ({error.strerror})") from error
    with open_video(source, limits=limits) as reader:
        info = reader.info
        digest = hashlib.sha256()
        first: np.ndarray | None = None
        still = info.num_frames > 1
        for _, frame in reader.frames(range(info.num_frames)):
            small = reader.to_rgb(frame, (_SIDE, _SIDE))
            first = small if first is None else first
            still = still and np.array_equal(small, first)
            digest.update(np.ascontiguousarray(small).data)
    return VideoFacts(
        num_frames=info.num_frames,
        fps=info.fps,
        variable_frame_rate=info.variable_frame_rate,
        width=info.width,
        height=info.height,
        content=digest.hexdigest(),
        still=still,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCost:
    """What a video costs under a contract."""

    seconds: float
    """Of one core, to decode and resize all of it."""

    cache_bytes: int
    """Of its frames in the cache."""


def decode_cost(source: Source, /, clip: ClipSpec, form: Form, *, limits: VideoLimits) -> DecodeCost:
    """Decode and resize all frames of a video as the cache does, and keep none: a job of the decode workers.

    Raises:
        VideoError: if it cannot be used.
    """
    made_with(form)  # loads what writes the form, which is no cost of the video
    start = time.process_time()
    with open_frames(source, clip, limits=limits) as stream:
        size = sum(len(encoded(frame, form)) for frame in stream.frames)
    return DecodeCost(seconds=time.process_time() - start, cache_bytes=size)
