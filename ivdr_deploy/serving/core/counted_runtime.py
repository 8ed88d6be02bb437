"""A runtime whose calls are counted, between the clip batcher and the one that runs."""

from __future__ import annotations

import numpy as np

from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.serving.core.metrics import BATCH_CLIPS, Metrics


class CountedRuntime(Runtime):
    """A runtime whose calls are counted."""

    def __init__(self, runtime: Runtime, metrics: Metrics) -> None:
        self.name = runtime.name
        self.precision = runtime.precision
        self.description = runtime.description
        self.output_names = runtime.output_names
        self.call_clips = runtime.call_clips
        self._runtime = runtime
        self._metrics = metrics

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``."""
        outputs = self._runtime.infer(video)
        self._metrics.observe(BATCH_CLIPS, len(video))
        return outputs

    def close(self) -> None:
        """Close the one that runs."""
        self._runtime.close()
