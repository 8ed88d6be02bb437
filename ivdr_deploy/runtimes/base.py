"""The protocol every runtime follows, and the model that a file on disk becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.artifacts.manifest import Variant, labels_sha256
from ivdr_deploy.errors import ArtifactError, ClipShapeError
from ivdr_deploy.spec import MAX_BATCH, OUTPUT_NAMES, ClipSpec, Device, Precision, RuntimeName, ViewPlan

CALL_CLIPS: dict[Device, int] = {"cpu": 20, "cuda": MAX_BATCH}
"""Two videos of ten clips on a CPU, which is busy with one; as much as there is on a GPU, which is not."""


_CPU_PIXELS = 20 * 16 * 112 * 112
"""Of the clips in one call on a CPU: the activations of a convolutional network take about 150 times their bytes, so
that a call stays within 2 GB."""


def clips_per_call(clip: ClipSpec, device: Device) -> int:
    """Return how many clips a call should hold: those of ``CALL_CLIPS``, on a CPU fewer where clips are large."""
    if device != "cpu":
        return CALL_CLIPS[device]
    return max(1, min(CALL_CLIPS[device], _CPU_PIXELS // (clip.num_frames * clip.crop_size**2)))


class Runtime(Protocol):
    """Executes one network. Safe to call from one thread at a time."""

    name: RuntimeName
    precision: Precision
    description: str
    """What really runs, for people: library, version, device, provider, precision."""

    output_names: tuple[str, ...]

    call_clips: int
    """Clips that a call should hold where there are enough: what fills the device without using much memory."""

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
class OpenRequest:
    """What a runtime needs to open one variant."""

    variant: Variant
    path: Path
    """The variant's first file."""

    clip: ClipSpec
    output_names: tuple[str, ...]
    device: Device = "cpu"
    threads: int | None = None
    """Threads of one operator on the CPU; None leaves the choice to the runtime."""

    source_sha256: str = ""
    """Digest of the file that the variant was derived from, where the bundle holds it."""

    labels: tuple[str, ...] = ()
    """Class names in the order of ``logits``; a file that names them in another order belongs to another bundle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A checkpoint, an ONNX file or a bundle that is open, checked and ready to run."""

    path: Path
    name: str
    version: str
    clip: ClipSpec
    view_plan: ViewPlan
    labels: tuple[str, ...]
    output_names: tuple[str, ...]
    runtime: Runtime
    variant: str
    """Id of the bundle's variant; for a single file the name of its runtime and its precision."""

    reason: str
    """Why this variant runs, for people."""

    sha256: str
    """Of the file that the runtime executes."""

    manifest: Mapping[str, Any]
    """What the artifact says about itself, as JSON can hold it."""

    golden_max_abs_diff: Mapping[str, float]
    """What the replay of the golden clips gave, per output; empty where there are none."""

    decode_mean_diff: Mapping[str, float]
    """How far the decoder is from the recorded clips of each golden video, in levels; empty where there are none."""

    golden: Golden | None = None
    """One golden clip and what the reference gave for it, to ask for again later; None where there is none."""

    @property
    def contract_hash(self) -> str:
        """Hash of the contract."""
        return self.clip.contract_hash


def infer_all(runtime: Runtime, video: np.ndarray) -> dict[str, np.ndarray]:
    """Run any number of clips in as few calls as ``MAX_BATCH`` allows; see ``Runtime.infer``."""
    parts = [runtime.infer(video[start : start + MAX_BATCH]) for start in range(0, len(video), MAX_BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def not_finite(outputs: Mapping[str, np.ndarray]) -> list[str]:
    """Name the outputs of a network that hold NaN or infinity."""
    return [name for name in OUTPUT_NAMES if name in outputs and not np.isfinite(outputs[name]).all()]


def check_labels(request: OpenRequest, found: Sequence[str]) -> None:
    """Refuse a file whose own labels are not those of its bundle: it would answer with the wrong names.

    Raises:
        ArtifactError: if they differ in number, name or order.
    """
    wanted = request.labels
    if wanted and tuple(found) != wanted:
        place = next(
            (at for at, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), 0
        )
        held = quoted(found[place]) if found else "none"
        raise ArtifactError(
            f"{request.path} has {len(found)} labels, the manifest {len(wanted)}, and they are not the same in this "
            f"order: number {place} is {held}, the manifest says {quoted(wanted[place])}",
            hint="file and manifest belong to different models; export the bundle again",
        )


def check_labels_digest(request: OpenRequest, found: str) -> None:
    """Refuse a file that was made for other labels than its bundle has, or for the same in another order.

    Args:
        request: Has the labels of the bundle.
        found: ``manifest.labels_sha256`` of those that the file was made for; empty where that was not noted.

    Raises:
        ArtifactError: if they differ.
    """
    wanted = labels_sha256(request.labels)
    if found and found != wanted:
        raise ArtifactError(
            f"{request.path} was made for other labels, or the same in another order: their SHA-256 begins "
            f"{quoted(found[:12])}, that of the manifest's {len(request.labels)} labels {wanted[:12]}",
            hint="file and manifest belong to different models; export the variant again",
        )


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
