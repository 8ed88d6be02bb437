"""A simulated accelerator: a runtime that takes 40 + 5n ms for n clips and leaves the processor to others.

It stands in for ONNX Runtime in the servers of the benchmark, and nowhere else (see ``stand_in``). The small network
runs inside that time, so that answers and golden clips stay right.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from examples.serving.stand_in import ACCELERATOR, TURN
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.runtimes import ort_runtime
from ivdr_deploy.runtimes.base import OpenRequest, Runtime
from ivdr_deploy.spec import MAX_BATCH, Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a call takes."""

    call_ms: float = 40.0
    clip_ms: float = 5.0
    most_clips: int = MAX_BATCH
    """Of one call; 1 is an accelerator without batching. More clips take several calls, one after the other."""

    def seconds(self, clips: int) -> float:
        """Return the time for a number of clips."""
        calls = math.ceil(clips / self.most_clips)
        return (calls * self.call_ms + clips * self.clip_ms) / 1000.0

    def variables(self) -> dict[str, str]:
        """Return the environment that tells it to a server."""
        return {ACCELERATOR: json.dumps(asdict(self))}


class Accelerator(Runtime):
    """Runs a network in the time that an accelerator would take.

    Args:
        inside: The network.
        cost: That time.
        turn: A file that is locked meanwhile: processes that name the same one share the accelerator.
    """

    def __init__(self, inside: Runtime, cost: Cost, *, turn: Path) -> None:
        self.name, self.precision, self.output_names = inside.name, inside.precision, inside.output_names
        self.description = f"simulated accelerator, {cost.call_ms:g} + {cost.clip_ms:g}n ms"
        self.call_clips = cost.most_clips
        self._inside, self._cost = inside, cost
        self._turn = turn.open()

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch; see ``Runtime.infer``."""
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            end = time.perf_counter() + self._cost.seconds(len(video))
            outputs = self._inside.infer(video)
            time.sleep(max(0.0, end - time.perf_counter()))
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
        return outputs

    def close(self) -> None:
        """Close the network inside."""
        self._turn.close()
        self._inside.close()


def misfit(variant: Variant, device: Device) -> str:
    """Say why a variant cannot run here, as ONNX Runtime would."""
    return ort_runtime.misfit(variant, device)


def open_variant(request: OpenRequest) -> Runtime:
    """Open a variant with ONNX Runtime, behind the cost that the environment names."""
    cost = Cost(**json.loads(os.environ[ACCELERATOR]))
    return Accelerator(ort_runtime.open_variant(request), cost, turn=Path(os.environ[TURN]))
