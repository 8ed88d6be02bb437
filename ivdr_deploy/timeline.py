"""A long video from its beginning to its end: windows through the network, and events made of what it says."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivdr_deploy.batching import Inferred
from ivdr_deploy.errors import ArtifactError, ConfigError, VideoTimeoutError
from ivdr_deploy.events import Event, EventFinder, TimelinePlan
from ivdr_deploy.pipeline import VideoPredictor, finite
from ivdr_deploy.records import to_dict
from ivdr_deploy.results import softmax, top_labels
from ivdr_deploy.spec import ClipSpec
from ivdr_deploy.video.reader import VideoInfo
from ivdr_deploy.video.source import VideoSource, as_source
from ivdr_deploy.video.windows import Windows

_TOGETHER = 8
"""Windows that are decoded and go to the network together. More would gain little on a CPU, and what is found would be
said later."""

_TOGETHER_BYTES = 16 << 20
"""Of such windows at most; four lots are held at a time."""

MOST_WAITING = 2 * _TOGETHER
"""Windows of one video that may wait for the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What the network says about one window of a video."""

    start_seconds: float
    end_seconds: float
    """When the frame after its last one is shown, or the video ends."""

    labels: Sequence[str]
    """Class names in the order of ``probabilities``."""

    probabilities: np.ndarray
    """(K,) float32."""

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the ``k`` most probable labels with their probabilities, best first; ties go to the lower index."""
        return top_labels(self.labels, self.probabilities, k)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineEnd:
    """Comes last: the whole video was looked at."""

    windows: int
    events: int
    hop: int
    """Frames of the sampling grid from window to window."""

    video: VideoInfo
    decode_ms: float
    preprocess_ms: float
    infer_ms: float
    """Time of the network for this video's share of the calls it was in."""


def checked_hop(plan: TimelinePlan, spec: ClipSpec) -> int:
    """Return the grid frames from window to window under a contract.

    Raises:
        ConfigError: if windows would leave out what lies between them.
    """
    window = spec.num_frames * spec.frame_stride
    if plan.hop > window:
        raise ConfigError(
            f"hop is {str(plan.hop)[:20]}, a window of this model has {window} frames of the sampling grid",
            hint=f"choose a hop from 1 to {window}",
        )
    return plan.hop or max(1, window // 2)


def look_through(
    predictor: VideoPredictor, source: VideoSource, plan: TimelinePlan, *, seconds: float = math.inf
) -> Generator[Window | Event | TimelineEnd, None, None]:
    """Yield what happens in a video while it is decoded: windows, events as soon as they have ended, and the end.

    Memory does not depend on the length of the video. Closing the iterator ends the decoding.

    Args:
        predictor: Whose network and decoder.
        source: A path, the encoded bytes, or a ``Source``.
        plan: Windows and thresholds.
        seconds: Time that all of it may take.

    Raises:
        VideoError: if the video cannot be used; also after some windows.
        VideoTimeoutError: if it takes longer than ``seconds``.
        InferenceError: if the network fails on it.
        ArtifactError: if the model has no classifier.
        ConfigError: if the plan's hop is longer than a window.
    """
    model = predictor.model
    if "logits" not in model.output_names:
        raise ArtifactError(
            f"the model {model.name} has no classifier, so that it names nothing in a timeline",
            hint=f"its outputs are {', '.join(model.output_names)}",
        )
    hop = checked_hop(plan, model.clip)
    most = max(
        1, min(_TOGETHER, model.runtime.call_clips, _TOGETHER_BYTES // math.prod(model.clip.clip_shape))
    )
    deadline = time.monotonic() + seconds
    looking = _Looking(model.labels, plan, hop)
    waiting: deque[tuple[Windows, Future[Inferred]]] = deque()
    with closing(predictor.windows(source, hop=hop, most=most)) as decoded:
        for windows in decoded:
            waiting.append((windows.without_pixels(), predictor.infer_clips(windows.video)))
            while len(waiting) > 1 or (waiting and waiting[0][1].done()):
                yield from looking.found(*waiting.popleft())
            if time.monotonic() > deadline:
                raise VideoTimeoutError(
                    f"{as_source(source).uri}: looking through it took longer than the limit of {seconds:g} s",
                    hint="send a shorter video, choose a larger hop, or raise the limit",
                )
    while waiting:
        yield from looking.found(*waiting.popleft())
    yield from looking.end()


def describe_found(found: Window | Event | TimelineEnd, *, top_k: int) -> tuple[str, dict[str, Any]]:
    """Return what was found as the command and the endpoint say it: its kind, and what JSON can hold of it."""
    if isinstance(found, Window):
        predictions = [{"label": label, "score": score} for label, score in found.top(top_k)]
        return "window", {
            "start_seconds": found.start_seconds,
            "end_seconds": found.end_seconds,
            "predictions": predictions,
        }
    if isinstance(found, Event):
        return "event", to_dict(found)
    values = to_dict(found)
    timings = {name: values.pop(name) for name in ("decode_ms", "preprocess_ms", "infer_ms")}
    return "summary", {**values, "timings": timings}


class _Looking:
    """What was found in one video so far."""

    def __init__(self, labels: Sequence[str], plan: TimelinePlan, hop: int) -> None:
        self._labels, self._hop = labels, hop
        self._finder = EventFinder(labels, plan)
        self._windows = self._events = 0
        self._decode_ms = self._preprocess_ms = self._infer_ms = 0.0

    def found(self, windows: Windows, inferred: Future[Inferred]) -> Iterator[Window | Event]:
        """Yield some windows, each after the events that had ended with the one before."""
        given = finite(inferred.result())
        probabilities = softmax(given.outputs["logits"])
        self._info = windows.info
        self._decode_ms += windows.decode_ms
        self._preprocess_ms += windows.preprocess_ms
        self._infer_ms += given.infer_ms
        for (start, end), part, row in zip(windows.seconds, windows.parts, probabilities, strict=True):
            yield from self._counted(self._finder.add((float(part[0]), float(part[1])), row))
            self._windows += 1
            yield Window(
                start_seconds=float(start), end_seconds=float(end), labels=self._labels, probabilities=row
            )

    def end(self) -> Iterator[Event | TimelineEnd]:
        """Yield the events that go on until the end, and the end."""
        yield from self._counted(self._finder.finish())
        yield TimelineEnd(
            windows=self._windows,
            events=self._events,
            hop=self._hop,
            video=self._info,
            decode_ms=self._decode_ms,
            preprocess_ms=self._preprocess_ms,
            infer_ms=self._infer_ms,
        )

    def _counted(self, events: list[Event]) -> list[Event]:
        self._events += len(events)
        return events
