"""The protocol every runtime follows, and the model that a file on disk becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from ivdr_deploy.errors import ClipShapeError
from ivdr_deploy.spec import ClipSpec, Precision, RuntimeName


class Runtime(Protocol):
    """Executes one network. Safe to call from one thread at a time."""

    name: RuntimeName
    precision: Precision
    description: str
    """What really runs, for people: library, version, device, provider, precision."""

    output_names: tuple[str, ...]

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch.

        Args:
            video: uint8 RGB, C-contiguous, shape (N, T, H, W, 3), N >= 1.

        Returns:
            float32 array per output name, first axis N: ``logits`` (N, K), ``feature`` (N, F),
            ``inter`` (N, D), ``intra`` (N, S, D).
        """
        ...

    def close(self) -> None:
        """Free what the runtime holds; calling it twice is allowed."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A checkpoint or bundle that is open, checked and ready to run."""

    path: Path
    name: str
    version: str
    clip: ClipSpec
    labels: tuple[str, ...]
    output_names: tuple[str, ...]
    runtime: Runtime
    golden_max_abs_diff: Mapping[str, float]
    """What the replay of the golden clips gave, per output; empty for a single file, which records none."""

    @property
    def contract_hash(self) -> str:
        """Hash of the contract."""
        return self.clip.contract_hash


def check_batch(video: np.ndarray, clip: ClipSpec) -> None:
    """Refuse a batch that the network was not made for.

    Raises:
        ClipShapeError: if ``video`` is not uint8 of shape (N, *clip.clip_shape) with N >= 1.
    """
    expected = ("N", *clip.clip_shape)
    if video.dtype != np.uint8 or video.ndim != 5 or video.shape[1:] != clip.clip_shape or not len(video):
        raise ClipShapeError(
            f"network input has dtype {video.dtype} and shape {video.shape}; expected uint8 {expected}",
            hint="make clips with ivdr_deploy.video.load_clips and the contract of this model",
        )
