"""Timelines of the endpoint: a few long videos at a time, told piece by piece or in one answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ivdr_deploy.errors import ConfigError, OptionError, QueueFullError
from ivdr_deploy.events import TimelinePlan
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.serving.core import metrics as counted
from ivdr_deploy.serving.core.answers import check_size
from ivdr_deploy.serving.core.metrics import Metrics
from ivdr_deploy.serving.core.schema import Options, PredictRequest, describe_model
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.timeline import TimelineEnd, checked_hop, describe_found, look_through

Found = tuple[str, dict[str, Any]]
"""Kind (``window``, ``event``, ``summary``) and what is said of it; the summary comes last."""


def check_timeline(options: Options, model: LoadedModel) -> TimelinePlan | None:
    """Return how a request wants a video looked through, None where it does not.

    Raises:
        OptionError: if that does not go with its other options, or is not possible with this model.
    """
    plan = options.timeline
    if plan is None:
        return None
    if "logits" not in model.output_names:
        raise OptionError("options: this model has no classifier, so that it names nothing in a timeline")
    if options.num_clips is not None or options.outputs not in (None, ("labels",)):
        raise OptionError(
            "options: num_clips and outputs do not go with timeline, which gives the labels of every window",
            hint="leave them out; timeline.hop says how close the windows are",
        )
    try:
        return replace(plan, hop=checked_hop(plan, model.clip))
    except ConfigError as error:
        raise OptionError(f"options: timeline: {error.message}", hint=error.hint) from error


class Timelines:
    """Looks through the videos of requests. Safe to use from many threads.

    Args:
        predictor: Whose network and decoder.
        settings: How many at a time, how long each may take.
        metrics: Where to count.
    """

    def __init__(self, predictor: VideoPredictor, settings: ServiceSettings, metrics: Metrics) -> None:
        self._predictor, self._settings, self._metrics = predictor, settings, metrics
        self._places = threading.BoundedSemaphore(settings.max_timelines)

    def find(self, request: PredictRequest) -> Iterator[Found]:
        """Yield what happens in a video as it is found. Closing the iterator ends the work.

        Raises:
            QueueFullError: if as many are looked through as may be at a time.
            OptionError, VideoError, InferenceError: as ``check_timeline`` and ``look_through``.
        """
        plan = check_timeline(request.options, self._predictor.model)
        assert plan is not None
        if not self._places.acquire(blocking=False):
            raise QueueFullError(
                f"{self._settings.max_timelines} long videos are being looked through, no more are taken",
                hint="send the request again after a while",
            )
        top_k = request.options.top_k or self._settings.top_k
        looking = look_through(self._predictor, request.video, plan, seconds=self._settings.timeline_seconds)
        try:
            for item in looking:
                kind, values = describe_found(item, top_k=top_k)
                if isinstance(item, TimelineEnd):
                    self._count(item)
                    if not request.options.timings:
                        del values["timings"]
                    values["model"] = describe_model(self._predictor.model)
                yield kind, values
        finally:
            looking.close()
            self._places.release()

    def whole(self, request: PredictRequest) -> dict[str, Any]:
        """Return all that ``find`` yields as one body; given up as soon as it is larger than any answer may be.

        Raises:
            OptionError: if it is; also as ``find``.
        """
        windows: list[dict[str, Any]] = []
        events: list[dict[str, Any]] = []
        size_bytes = 0
        for kind, values in self.find(request):
            if kind == "summary":
                return {**values, "windows": windows, "events": events}
            (windows if kind == "window" else events).append(values)
            size_bytes += len(json.dumps(values))
            check_size(size_bytes)
        raise AssertionError("a timeline ends with its summary")

    def _count(self, end: TimelineEnd) -> None:
        self._metrics.add(counted.CLIPS, end.windows)
        self._metrics.observe(counted.DECODE_SECONDS, end.decode_ms / 1000.0)
        self._metrics.observe(counted.PREPROCESS_SECONDS, end.preprocess_ms / 1000.0)
        self._metrics.observe(counted.INFER_SECONDS, end.infer_ms / 1000.0)
