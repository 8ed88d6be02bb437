"""What an artifact says about itself: the contract, the network, how far each part was trained, and what is inside.

These records travel from the training config into the checkpoint, the ONNX file, the engine, the archive and the score
table, and are never typed again. Standard library only, so that reading them costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import to_dict

FORMAT_VERSION = 1
"""Raised whenever a checkpoint or bundle written by an older version could be misread."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INPUT_NAME = "video"
"""Name of the network's one input in every exported file."""

MAX_BATCH = 64
"""Clips in one call of a runtime: the upper bound of the exported batch axis."""

OUTPUT_NAMES = ("logits", "feature", "inter", "intra")
"""Every output a network can have, in the order in which they are exported."""

RuntimeName = Literal["torch", "onnxruntime", "tensorrt"]
Precision = Literal["fp32", "fp16", "int8"]
Device = Literal["cpu", "cuda"]
DecoderName = Literal["pyav", "opencv"]


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise ConfigError(message, hint=hint)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """The contract: how a video file becomes network input. Everything that reads pixels takes one of these.

    The network input is uint8 RGB, shape (num_clips, num_frames, crop_size, crop_size, 3); normalisation with ``mean``
    and ``std`` happens inside the network.
    """

    num_frames: int = 16
    """Frames fed together as one clip (T)."""

    frame_stride: int = 4
    """Distance between consecutive frames of a clip: in frames of ``target_fps`` when that is set, of the video's own
    average rate otherwise."""

    target_fps: float | None = None
    """Frames per second of the sampling grid; None takes the video's own rate. A video whose frames are unevenly spaced
    is sampled by time either way."""

    num_clips: int = 10
    """Clips taken from one video when it is scored; their softmax outputs are averaged."""

    placement: Literal["uniform"] = "uniform"
    """``uniform``: clip centres evenly spaced from half a clip after the start to half a clip before the end, ends
    included (a single clip sits in the middle). Indices past either end repeat the end frame."""

    short_side: int = 128
    """Length in pixels of the shorter side after the aspect-true resize."""

    crop_size: int = 112
    """Side in pixels of the square centre crop (H = W)."""

    resize: Literal["swscale-bilinear"] = "swscale-bilinear"
    """Identity of the resize algorithm. A change of its pixels needs a new name."""

    color: Literal["rgb"] = "rgb"
    """Channel order."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean of pixel values in 0..1."""

    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation of pixel values in 0..1."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "frame_stride", "num_clips", "short_side", "crop_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, found {getattr(self, name)}")
        _require(
            self.crop_size <= self.short_side,
            f"crop_size {self.crop_size} is larger than short_side {self.short_side}",
            "a crop must fit into the resized frame",
        )
        _require(
            self.target_fps is None or self.target_fps > 0,
            f"target_fps must be positive, found {self.target_fps}",
        )
        _require(all(value > 0 for value in self.std), f"every std must be positive, found {self.std}")

    @property
    def contract_hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON; two artifacts with the same hash take the same input."""
        return hashlib.sha256(canonical_json(to_dict(self)).encode()).hexdigest()

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Shape (T, H, W, C) of one clip."""
        return (self.num_frames, self.crop_size, self.crop_size, 3)

    def differences(self, other: ClipSpec) -> list[str]:
        """Name every field in which two contracts differ, as ``field: mine != theirs``."""
        mine, theirs = to_dict(self), to_dict(other)
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which network to build; see ``models.network.build_model``."""

    backbone: str = "r2plus1d_10"
    """Name of a video backbone, see ``models.backbones``."""

    num_slots: int = 2
    """Vectors per clip in the series head (S); pre-training needs it to divide ``num_frames``."""

    clip_dim: int = 128
    """Size of the clip head's embedding, used by pre-training only."""

    slot_dim: int = 64
    """Size of one slot (D); also the size of ``inter``."""

    num_classes: int = 0
    """Classes of the classifier (K); 0 builds none."""

    dropout: float = 0.0
    """Probability of dropping a feature before the classifier while training."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "clip_dim", "slot_dim"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, found {getattr(self, name)}")
        _require(self.num_classes >= 0, f"num_classes must not be negative, found {self.num_classes}")
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), found {self.dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """How far each part was trained. A head is valid while it was trained up to the backbone's last change."""

    backbone_step: int = 0
    """Optimiser steps that changed the backbone, over all stages."""

    head_steps: dict[str, int] = field(default_factory=dict)
    """For each head (``clip_head``, ``series_head``, ``classifier``): the ``backbone_step`` up to which it was trained
    together with (or on top of) this backbone. Absent means never trained."""

    def is_valid(self, head: str) -> bool:
        """Whether ``head`` was trained, and still fits the backbone."""
        return self.head_steps.get(head) == self.backbone_step

    def valid_outputs(self) -> tuple[str, ...]:
        """Names of the outputs worth exporting, in the order of ``OUTPUT_NAMES``."""
        heads = {"logits": "classifier", "inter": "series_head", "intra": "series_head"}
        return tuple(name for name in OUTPUT_NAMES if name not in heads or self.is_valid(heads[name]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where an artifact came from."""

    created_at: str = ""
    """UTC time, ISO 8601."""

    git_revision: str = ""
    """Commit of the code, with ``-dirty`` when the tree had changes; empty when unknown."""

    data_hash: str = ""
    """SHA-256 over the training list (paths relative to it, labels, and sizes)."""

    seed: int | None = None
    """Seed of the training run."""

    packages: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that shape the numbers."""

    config: dict[str, Any] = field(default_factory=dict)
    """The resolved training configuration."""

    metrics: dict[str, float] = field(default_factory=dict)
    """What was measured at the end of training, e.g. ``video_accuracy``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """Everything a checkpoint carries besides weights and golden clips."""

    format_version: int = FORMAT_VERSION
    clip: ClipSpec
    model: ModelSpec
    labels: tuple[str, ...] = ()
    """Class names in the order of the logits."""

    training: TrainingState = field(default_factory=TrainingState)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        _require(
            len(self.labels) == self.model.num_classes,
            f"{len(self.labels)} labels for a classifier of {self.model.num_classes} classes",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a bundle."""

    path: str
    """Relative to the bundle."""

    sha256: str
    size_bytes: int
    kind: Literal["model", "golden", "sidecar", "document"]
    runtime: RuntimeName | None = None
    """What executes it, for ``kind == "model"``."""

    precision: Precision | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputParity:
    """How far one output of one runtime is from torch over the golden clips."""

    runtime: RuntimeName
    precision: Precision
    output: str
    max_abs_diff: float
    min_cosine: float
    """Smallest cosine similarity over the golden clips."""

    tolerance: float
    """Largest ``max_abs_diff`` that passes."""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (NaN never is)."""
        return self.max_abs_diff <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """One named output of the network."""

    name: str
    shape: tuple[int, ...]
    """Without the batch axis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactManifest:
    """``manifest.json`` of a bundle."""

    format_version: int = FORMAT_VERSION
    name: str
    version: str
    clip: ClipSpec
    contract_hash: str
    model: ModelSpec
    labels: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    training: TrainingState
    files: tuple[FileEntry, ...]
    parity: tuple[OutputParity, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    ivdr_version: str
    """Version of ivdr_deploy that wrote the bundle."""

    def __post_init__(self) -> None:
        _require(
            self.contract_hash == self.clip.contract_hash,
            f"the contract hash {self.contract_hash[:12]} is not that of the contract ({self.clip.contract_hash[:12]})",
            "the manifest was edited by hand; export the bundle again",
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(output.name for output in self.outputs)


def canonical_json(value: Any) -> str:
    """Serialise to JSON with one spelling for equal values: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
