"""TorchServe handler: carries requests to ``InferenceService`` and its answers back.

TorchServe loads this file by its name and allows one class in it. It would report a failed import at the top
as a missing built-in handler: everything is imported where it is used, so that the log shows the true cause.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class IvdrHandler:
    """One worker's model."""

    def initialize(self, context: Any) -> None:
        """Load the bundle that lies in the archive; the worker is READY only if the golden clips agree."""
        from ivdr_deploy.serving.core.service import InferenceService

        bundle = Path(context.system_properties["model_dir"]) / "bundle"
        self._service = InferenceService.from_config(bundle, context.model_yaml_config["handler"])

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer one batch, each request with its own status."""
        # TorchServe may put a question of its management port into a batch of videos.
        asked = [context.get_request_header(i, "describe") == "True" for i in range(len(data))]
        requests = [None if question else row for question, row in zip(asked, data, strict=True)]
        self._busy(context, 1)
        try:
            responses = self._service.handle(requests)
        finally:
            self._busy(context, 0)
        for i, response in enumerate(responses):
            context.set_response_status(code=response.status, idx=i)
            context.set_response_content_type(i, "application/json")
        self._count(context, responses)
        return [response.to_json() for response in responses]

    def _busy(self, context: Any, value: int) -> None:
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        worker = [Dimension("Worker", str(os.getpid()))]
        context.metrics.add_metric(
            "ivdr_busy", value, "count", dimensions=worker, metric_type=MetricTypes.GAUGE
        )

    def _count(self, context: Any, responses: list[Any]) -> None:
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        # Every call gets lists of its own: TorchServe writes into the one it is given.
        histogram = {"metric_type": MetricTypes.HISTOGRAM}
        context.metrics.add_metric("ivdr_batch_size", len(responses), "count", dimensions=[], **histogram)
        for response in responses:
            context.metrics.add_counter(
                "ivdr_requests", 1, dimensions=[Dimension("Outcome", response.outcome)]
            )
            context.metrics.add_counter("ivdr_clips", response.clips, dimensions=[])
            for stage, seconds in response.stage_seconds.items():
                context.metrics.add_time(
                    f"ivdr_{stage}_seconds", seconds, unit="s", dimensions=[], **histogram
                )
