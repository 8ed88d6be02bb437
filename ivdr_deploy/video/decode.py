"""Open a video with one of the decoders; none is imported before it is used."""

from __future__ import annotations

from typing import get_args

from ivdr_deploy._optional import require
from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import DecoderName
from ivdr_deploy.video import frame_array
from ivdr_deploy.video._source import check_source
from ivdr_deploy.video.reader import VideoLimits, VideoReader
from ivdr_deploy.video.source import VideoSource


def open_video(
    source: VideoSource, *, limits: VideoLimits | None = None, decoder: DecoderName = "pyav"
) -> VideoReader:
    """Open a video for reading.

    Args:
        source: Path of a local file, or its bytes: a video, or frames and times that ``frame_array`` describes.
        limits: What the video may cost; the defaults when None.
        decoder: ``pyav``, or ``opencv``, which reads paths only. Nothing switches from one to the other by
            itself, as decoders need not agree on every pixel.

    Raises:
        VideoOpenError: if the source is not a readable video file of an allowed container.
        NoVideoStreamError: if it holds no pictures; OpenCV says ``VideoOpenError`` of most such files.
        VideoLimitError: if it is larger, longer or wider than the limits.
        VideoDecodeError: if its first frame cannot be decoded, or OpenCV cannot convert its frames (interlaced video).
        VideoTimeoutError: if indexing takes longer than the limit.
        ConfigError: on an unknown decoder, or bytes for OpenCV.
        MissingDependencyError: if the decoder is not installed.
    """
    limits = limits or VideoLimits()
    if decoder == "pyav":
        checked = check_source(source, limits)
        if checked.container == frame_array.CONTAINER:
            return frame_array.FrameArrayReader(checked, limits)
        from ivdr_deploy.video._pyav import PyAvReader

        return PyAvReader(checked, limits)
    if decoder == "opencv":
        require("cv2", extra="opencv")
        from ivdr_deploy.video._opencv import OpenCvReader

        return OpenCvReader(check_source(source, limits), limits)
    raise ConfigError(
        f"unknown decoder {quoted(decoder)}", hint=f"known decoders: {', '.join(get_args(DecoderName))}"
    )
