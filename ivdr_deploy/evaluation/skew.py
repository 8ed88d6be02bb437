"""Do two decoders give the same clips, and does it matter? PyAV beside OpenCV, on real videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import numpy as np

from ivdr_deploy._console import Track
from ivdr_deploy._text import reason_of
from ivdr_deploy.artifacts.golden_video import compare_clips
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.errors import VideoError
from ivdr_deploy.evaluation.verify_report import SkewedVideo
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.base import LoadedModel, infer_all


def measure_skew(
    model: LoadedModel, videos: VideoList, reading: Callable[..., VideoPredictor], track: Track
) -> tuple[SkewedVideo, ...]:
    """Decode every video twice and run both on one network.

    Args:
        model: Labels the clips.
        videos: The list.
        reading: Makes a predictor of a model and a ``decoder``.
        track: Wraps the run over the videos.
    """
    with ExitStack() as stack:
        pyav, opencv = (stack.enter_context(reading(model, decoder=name)) for name in ("pyav", "opencv"))
        watched: Iterable[VideoItem] = track(videos.items, len(videos.items), "decoding twice")
        return tuple(_compare(item, pyav, opencv) for item in watched)


def _compare(item: VideoItem, pyav: VideoPredictor, opencv: VideoPredictor) -> SkewedVideo:
    try:
        one, other = pyav.load(item.path).video, opencv.load(item.path).video
    except VideoError as error:
        return SkewedVideo(uri=item.uri, mean_diff=None, expected="", found="", error=error.message)
    if one.shape != other.shape:
        numbers = f"PyAV gives {len(one)} clips, OpenCV {len(other)}"
        return SkewedVideo(uri=item.uri, mean_diff=None, expected="", found="", error=numbers)
    try:
        labels = _label(pyav.model, one), _label(pyav.model, other)
    except Exception as error:  # noqa: BLE001  # a runtime raises what it likes, and the other videos can be compared
        reason = f"the reference fails ({type(error).__name__}: {reason_of(error)})"
        return SkewedVideo(uri=item.uri, mean_diff=None, expected="", found="", error=reason)
    return SkewedVideo(uri=item.uri, mean_diff=compare_clips(one, other), expected=labels[0], found=labels[1])


def _label(model: LoadedModel, clips: np.ndarray) -> str:
    logits = infer_all(model.runtime, clips).get("logits")
    return "" if logits is None else model.labels[int(softmax(logits).mean(axis=0).argmax())]
