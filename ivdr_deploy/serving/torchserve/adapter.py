"""Between TorchServe and the service: what a request is there, and where its answers and counts go."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivdr_deploy.serving.core.metrics import Metric, Metrics, Series
from ivdr_deploy.serving.core.schema import Response
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.torchserve.archive import BUNDLE_FOLDER, MODEL_CONFIG_FILE
from ivdr_deploy.serving.torchserve.settings import service_settings


class TorchServeAdapter:
    """Answers TorchServe's batches with one service. TorchServe calls it from one thread.

    Args:
        context: TorchServe's; it says where the archive was unpacked, and holds the settings packed in it.

    Raises:
        ArtifactError: if the archive was packed by another version, or as ``InferenceService.open``.
    """

    def __init__(self, context: Any) -> None:
        settings = service_settings(context.model_yaml_config, where=MODEL_CONFIG_FILE)
        bundle = Path(context.system_properties["model_dir"]) / BUNDLE_FOLDER
        self._observed: deque[tuple[Metric, float]] = deque()
        self._passed: dict[Series, float] = {}
        metrics = Metrics(on_observe=lambda metric, value: self._observed.append((metric, value)))
        self._service = InferenceService.open(bundle, settings, metrics=metrics)

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[str]:
        """Answer one batch, each request with its own status."""
        # TorchServe may put a question of its management port into a batch of videos.
        waiting = [
            None if context.get_request_header(i, "describe") == "True" else self._service.submit(parts)
            for i, parts in enumerate(data)
        ]
        self._pass_on(context)  # ivdr_busy: `ivdr serve` looks at it before it stops
        answers = [
            Response(status=200, body=self._service.describe()) if future is None else future.result()
            for future in waiting
        ]
        self._pass_on(context)
        for i, answer in enumerate(answers):
            context.set_response_status(code=answer.status, idx=i)
            context.set_response_content_type(i, "application/json")
        return [answer.to_json() for answer in answers]

    def close(self) -> None:
        """Stop the service."""
        self._service.close()

    def _pass_on(self, context: Any) -> None:
        """Give TorchServe what was counted since the last time; it adds up the workers."""
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        for series, value in self._service.metrics.values().items():
            change = value - self._passed.get(series, 0.0)
            if not change or series.metric.unit == "seconds":
                continue
            self._passed[series] = value
            kind = MetricTypes.COUNTER
            dimensions = [Dimension(name, text) for name, text in series.labels]
            if series.metric.kind == "gauge":  # each worker has a value of its own
                change, kind = value, MetricTypes.GAUGE
                dimensions.append(Dimension("worker", str(os.getpid())))
            context.metrics.add_metric(series.name, change, "count", dimensions=dimensions, metric_type=kind)
        # TorchServe's own histograms have fixed buckets, which are made for seconds. It logs every value that it is
        # given: as the counters of their buckets these would be fifty lines a request.
        while self._observed:
            metric, value = self._observed.popleft()
            if metric.unit == "seconds":
                context.metrics.add_metric(
                    metric.name, value, "s", dimensions=[], metric_type=MetricTypes.HISTOGRAM
                )
