"""Between TorchServe and the service: what a request is there, and where its answers and counts go."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivdr_deploy._memory import keep_memory_of_requests
from ivdr_deploy.artifacts.archive import BUNDLE_FOLDER, check_unpacked
from ivdr_deploy.environment import engine_threads, only_gpu
from ivdr_deploy.serving.core.metrics import Metric, Metrics, Series
from ivdr_deploy.serving.core.schema import Envelope, Response
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.torchserve.archive import MODEL_CONFIG_FILE
from ivdr_deploy.serving.torchserve.settings import DRAIN_VARIABLE, service_settings

_GATHER_SECONDS = 0.02
"""Between an answer and the counts of it. TorchServe reads each from a line of the worker's log, and before the answer
these lines took 1.5 ms."""


class TorchServeAdapter:
    """Answers TorchServe's batches with one service. TorchServe calls it from one thread.

    Args:
        context: TorchServe's; it says where the archive was unpacked, and holds the settings packed in it.

    Raises:
        ArtifactError: if the archive was packed by another version, its files were changed, or as
            ``InferenceService.open``.
    """

    def __init__(self, context: Any) -> None:
        _choose_gpu(context.system_properties["gpu_id"])
        keep_memory_of_requests()
        drain_file = os.environ.get(DRAIN_VARIABLE)
        self._drain_file = Path(drain_file) if drain_file else None
        settings = service_settings(context.model_yaml_config, where=MODEL_CONFIG_FILE)
        if settings.threads is None:  # the workers of a model share the cores
            workers = context.model_yaml_config.get("minWorkers", 1)
            settings = replace(settings, threads=engine_threads(workers))
        folder = Path(context.system_properties["model_dir"])
        check_unpacked(folder)
        self._observed: deque[tuple[Metric, float]] = deque()
        self._passed: dict[Series, float] = {}
        metrics = Metrics(on_observe=lambda metric, value: self._observed.append((metric, value)))
        self._service = InferenceService.open(folder / BUNDLE_FOLDER, settings, metrics=metrics)
        self._answered, self._closed = threading.Event(), threading.Event()
        self._passing = threading.Lock()
        threading.Thread(target=self._pass_on_later, args=(context,), name="counts", daemon=True).start()

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answer one batch, each request with its own status."""
        if self._drain_file is not None and self._drain_file.exists():
            self._service.drain()
        # TorchServe may put a question of its management port into a batch of videos.
        waiting = [
            None
            if context.get_request_header(i, "describe") == "True"
            else self._service.submit(parts, _envelope(parts, context.get_all_request_header(i)))
            for i, parts in enumerate(data)
        ]
        self._pass_on(context)  # ivdr_busy: `ivdr serve` looks at it before it stops
        answers = [
            Response(status=200, body=self._service.describe()) if future is None else future.result()
            for future in waiting
        ]
        self._answered.set()
        for i, answer in enumerate(answers):
            context.set_response_status(code=answer.status, idx=i)
            context.set_response_content_type(i, "application/json")
            for name, value in answer.headers.items():
                context.set_response_header(i, name, value)
        return [answer.json for answer in answers]

    def close(self) -> None:
        """Stop the service."""
        self._service.close()
        self._closed.set()
        self._answered.set()

    def _pass_on_later(self, context: Any) -> None:
        while not self._closed.is_set():
            self._answered.wait()
            time.sleep(_GATHER_SECONDS)
            self._answered.clear()
            self._pass_on(context)

    def _pass_on(self, context: Any) -> None:
        """Give TorchServe what was counted since the last time; it adds up the workers."""
        with self._passing:
            self._log_counts(context)

    def _log_counts(self, context: Any) -> None:
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


def _envelope(parts: Mapping[str, Any], headers: Mapping[str, Any]) -> Envelope:
    """Tell what TorchServe lets its workers see: the headers, and not the method.

    Netty adds ``content-length: 0``, spelled so, where a request declares no body, as with GET, HEAD and DELETE. A POST
    without a body that is spelled so too is taken for one of them; both are refused.
    """
    bodiless = not parts.get("body", b"?") and headers.get("content-length") == "0"
    encodings = [value for name, value in headers.items() if name.lower() == "content-encoding"]
    return Envelope(
        method="GET, HEAD or DELETE" if bodiless else "POST",
        content_encoding=str(encodings[0]) if encodings else "",
    )


def _choose_gpu(gpu_id: int | None) -> None:
    """Show this process the one GPU that TorchServe gave it, before anything looks for GPUs: it is `cuda` then."""
    if gpu_id is not None and gpu_id >= 0 and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        os.environ |= only_gpu(gpu_id)
