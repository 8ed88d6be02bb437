"""What an artifact says about itself: the contract, the network, how far each part was trained, and what is inside.

These records travel from the training config into the checkpoint, the ONNX file, the engine, the archive and the score
table, and are never typed again. Standard library only, so that reading them costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import require_within, to_dict

FORMAT_VERSION = 2
"""Of checkpoints, bundles, ONNX metadata and sidecars. Raised when an older reader could misread a newer file; older
files stay readable, see ``artifacts.former``. 1: the view plan was a part of the contract."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INPUT_NAME = "video"
"""Name of the network's one input in every exported file."""

MAX_BATCH = 64
"""Clips in one call of a runtime: the upper bound of the exported batch axis."""

MAX_CLIPS = 1024
"""Clips that a view plan may take from one video."""

_MOST_FRAMES = 4096
_MOST_PIXELS = 8192
"""Of a clip, and along one side: a contract is also read from foreign files, and decides what a clip takes."""

_MOST_STRIDE = 1 << 16
_MOST_FPS = 1000.0
_MOST_HOP = 1 << 24

OUTPUT_NAMES = ("logits", "feature", "inter", "intra")
"""Every output a network can have, in the order in which they are exported."""

RuntimeName = Literal["torch", "onnxruntime", "tensorrt", "aoti"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Engine = Literal["onnx", "torch", "aoti", "trt"]
"""What an exported variant is made for."""
Device = Literal["cpu", "cuda"]
DecoderName = Literal["pyav", "opencv"]
Isolation = Literal["process", "thread"]

_CONTRACT_VERSION = 2
"""Of the canonical JSON that the contract hash is taken over."""

_ADDED_LATER = {"added_later": True}
"""Marks a field that older contracts do not have: while it holds its default it is left out of the canonical JSON, so
that the hash of an older contract stays what it was."""


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise ConfigError(message, hint=hint)


def _whole(name: str, value: float) -> int:
    _require(value == int(value), f"{name} must be a whole number, found {quoted(value)}")
    return int(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """The contract: what the tensor of one clip is. Everything that reads pixels takes one of these.

    The network input is uint8 RGB, shape (N, num_frames, crop_size, crop_size, 3); normalisation with ``mean`` and
    ``std`` happens inside the network. Which clips of a video are looked at is not part of it: see ``ViewPlan``.
    """

    num_frames: int = 16
    """Frames fed together as one clip (T)."""

    frame_stride: int = 4
    """Distance between consecutive frames of a clip: in frames of ``target_fps`` when that is set, of the video's own
    average rate otherwise."""

    target_fps: float | None = None
    """Frames per second of the sampling grid; None takes the video's own rate. A video whose frames are unevenly spaced
    is sampled by time either way."""

    short_side: int = 128
    """Length in pixels of the shorter side after an aspect-true resize; 0 where ``exact_size`` is given."""

    exact_size: tuple[int, int] | None = field(default=None, metadata=_ADDED_LATER)
    """Height and width in pixels to resize to, whatever the aspect; torchvision's video weights want (128, 171)."""

    crop_size: int = 112
    """Side in pixels of the square crop (H = W)."""

    resize: Literal["swscale-bilinear"] = "swscale-bilinear"
    """Identity of the resize algorithm. A change of its pixels needs a new name."""

    color: Literal["rgb"] = "rgb"
    """Channel order."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean of pixel values in 0..1; 0.5, with ``std`` 0.5, gives values in -1..1."""

    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation of pixel values in 0..1."""

    def __post_init__(self) -> None:
        # One spelling for equal values, since the hash is taken over it: 16.0 becomes 16, 0 and -0.0 become 0.0.
        for name in ("num_frames", "frame_stride", "short_side", "crop_size"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.exact_size is not None:
            size = tuple(_whole("exact_size", value) for value in self.exact_size)
            object.__setattr__(self, "exact_size", size)
        if self.target_fps is not None:
            object.__setattr__(self, "target_fps", float(self.target_fps))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) + 0.0 for value in getattr(self, name)))
        require_within("num_frames", self.num_frames, 1, _MOST_FRAMES)
        require_within("frame_stride", self.frame_stride, 1, _MOST_STRIDE)
        require_within("crop_size", self.crop_size, 1, _MOST_PIXELS)
        _require(
            self.short_side >= 1 if self.exact_size is None else self.short_side == 0,
            f"short_side is {quoted(self.short_side)} and exact_size {quoted(self.exact_size)}",
            "give a short side, or an exact size with short_side = 0",
        )
        require_within("short_side", self.short_side, 0, _MOST_PIXELS)
        for side in self.exact_size or ():
            require_within("exact_size", side, 1, _MOST_PIXELS)
        smaller = min(self.exact_size) if self.exact_size else self.short_side
        _require(
            self.crop_size <= smaller,
            f"crop_size {self.crop_size} is larger than the resized frame's shorter side, {smaller}",
            "a crop must fit into the resized frame",
        )
        _require(
            self.target_fps is None or 0 < self.target_fps <= _MOST_FPS,
            f"target_fps must be positive and at most {_MOST_FPS:g}, found {quoted(self.target_fps)}",
        )
        _require(all(map(math.isfinite, self.mean)), f"every mean must be finite, found {self.mean}")
        _require(
            all(0 < value < math.inf for value in self.std),
            f"every std must be positive and finite, found {self.std}",
        )

    @property
    def contract_hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON; two artifacts with the same hash give the same pixels per clip."""
        values = {
            item.name: to_dict(getattr(self, item.name))
            for item in fields(self)
            if not (item.metadata.get("added_later") and getattr(self, item.name) == item.default)
        }
        return hashlib.sha256(canonical_json({"contract": _CONTRACT_VERSION, **values}).encode()).hexdigest()

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Shape (T, H, W, C) of one clip."""
        return (self.num_frames, self.crop_size, self.crop_size, 3)

    def differences(self, other: ClipSpec) -> list[str]:
        """Name every field in which two contracts differ, as ``field: mine != theirs``."""
        mine, theirs = to_dict(self), to_dict(other)
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPlan:
    """Which clips of a video are looked at. Recorded beside the contract and with every answer, not hashed into it."""

    placement: Literal["uniform", "sliding"] = "uniform"
    """``uniform``: clip centres evenly spaced from half a clip after the start to half a clip before the end, ends
    included; a single clip takes the middle. ``sliding``: a clip every ``hop`` grid frames, from the first frame on.
    Indices past either end repeat the end frame."""

    num_clips: int = 10
    """Clips of one video; with ``sliding`` the most, and a video that needs more is refused as too large."""

    hop: int = 0
    """Grid frames between the starts of sliding clips; 0 takes the length of a clip, so that they just touch."""

    spatial_crops: Literal[1, 3] = 1
    """1: the centre crop. 3: one at each end of the longer side and the centre, for each clip."""

    def __post_init__(self) -> None:
        _require(
            self.spatial_crops in (1, 3), f"spatial_crops must be 1 or 3, found {quoted(self.spatial_crops)}"
        )
        most = MAX_CLIPS // self.spatial_crops
        require_within("num_clips", self.num_clips, 1, most)
        require_within("hop", self.hop, 0, _MOST_HOP)
        _require(
            not self.hop or self.placement == "sliding", f"hop {self.hop} is for placement 'sliding' only"
        )

    @property
    def max_views(self) -> int:
        """Most clips that one video gives, its spatial crops included."""
        return self.num_clips * self.spatial_crops

    def __str__(self) -> str:
        crops = "centre crop" if self.spatial_crops == 1 else f"{self.spatial_crops} crops each"
        if self.placement == "sliding":
            every = f"every {self.hop} frames" if self.hop else "one after the other"
            return f"sliding clips {every}, at most {self.num_clips}, {crops}"
        return f"{self.num_clips} clip{'s' * (self.num_clips > 1)}, {crops}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Which network to build; see ``models.network.build_model``."""

    backbone: str = "r2plus1d_10"
    """Name of a video backbone, see ``models.backbones``."""

    backbone_config: dict[str, Any] = field(default_factory=dict)
    """Of the backbone ``hf``: what ``config.json`` of the Hugging Face model says, without its labels."""

    num_slots: int = 2
    """Vectors per clip in the series head (S), 0 for none; pre-training needs it to divide ``num_frames``."""

    clip_dim: int = 128
    """Size of the clip head's embedding, used by pre-training only; 0 for no such head."""

    slot_dim: int = 64
    """Size of one slot (D); also the size of ``inter``."""

    head_norm: Literal["none", "series", "both"] = "none"
    """Batch norm without weights in front of the series head, or of clip and series head. It takes away what all clips
    share, without which the shuffle-rank loss stays at chance."""

    num_classes: int = 0
    """Classes of the classifier (K); 0 builds none."""

    dropout: float = 0.0
    """Probability of dropping a feature before the classifier while training."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "clip_dim", "num_classes"):
            _require(
                getattr(self, name) >= 0, f"{name} must not be negative, found {quoted(getattr(self, name))}"
            )
        _require(self.slot_dim >= 1, f"slot_dim must be at least 1, found {quoted(self.slot_dim)}")
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

    origin: dict[str, str] = field(default_factory=dict)
    """Where imported weights came from: file, SHA-256, licence and so on. Training that starts from them keeps it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """Everything a checkpoint carries besides weights and golden clips."""

    format_version: int = FORMAT_VERSION
    clip: ClipSpec
    view_plan: ViewPlan = field(default_factory=ViewPlan)
    """Clips of a video that evaluation and scoring look at unless told otherwise."""

    model: ModelSpec
    labels: tuple[str, ...] = ()
    """Class names in the order of the logits."""

    training: TrainingState = field(default_factory=TrainingState)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        _require(
            len(self.labels) == self.model.num_classes,
            f"{len(self.labels)} labels for a classifier of {quoted(self.model.num_classes)} classes",
        )


def require_outputs(names: Sequence[str]) -> None:
    """Refuse names that no output of ours has: nothing would know what it is, or look for NaN in it.

    Raises:
        ConfigError: if one is none of ``OUTPUT_NAMES``, or stands there twice.
    """
    for place, name in enumerate(names):
        _require(name in OUTPUT_NAMES, f"the output {quoted(name)} is none of {', '.join(OUTPUT_NAMES)}")
        _require(name not in names[:place], f"there are two outputs {quoted(name)}")


def canonical_json(value: Any) -> str:
    """Serialise to JSON with one spelling for equal values: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
