"""Networks and batches for the tests of a training step."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec
from train.augment import Changes, draw_changes
from train.config import AugmentConfig
from train.data import draw_permutations
from train.method import DualConfig

CLIP = ClipSpec(num_frames=12, short_side=36, crop_size=32)
OFF = AugmentConfig(jitter_probability=0.0)
ALL = AugmentConfig(blur_probability=0.5, flip_probability=0.5)


PAPER = DualConfig(rank_weight=1.0, rank_clamp=5.0, rank_exclude_identity=False, bn_batches="reference")


def network(
    slots: int = 3,
    *,
    classes: int = 0,
    dropout: float = 0.0,
    head_norm: Literal["none", "series", "both"] = "none",
) -> VideoModel:
    torch.manual_seed(0)
    spec = ModelSpec(
        backbone="tiny", num_slots=slots, clip_dim=16, slot_dim=8, num_classes=classes, dropout=dropout,
        head_norm=head_norm,
    )  # fmt: skip
    return build_model(spec, CLIP).train()


def scenes(count: int, frames: int = CLIP.num_frames) -> np.ndarray:
    """Coarse random pictures that change from frame to frame, uint8 (count, frames, 36, 36, 3)."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, frames, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(9, axis=2).repeat(9, axis=3)


def random_crops(shown: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Three random crops of every scene, uint8 (3, B, T, 32, 32, 3)."""
    views = np.empty((3, *shown.shape[:2], 32, 32, 3), np.uint8)
    for view in views:
        for target, scene in zip(view, shown, strict=True):
            y, x = rng.integers(0, 5, 2)
            target[...] = scene[:, y : y + 32, x : x + 32]
    return torch.from_numpy(views)


def batch(
    count: int, slots: int = 3, *, augment: AugmentConfig = ALL, seed: int = 0
) -> tuple[Tensor, Changes, Tensor]:
    """Return the arguments of ``DualStep.forward``."""
    rng = np.random.default_rng(seed)
    views = random_crops(scenes(count), rng)
    changes = draw_changes(augment, 3 * count, rng=rng)
    return views, changes, torch.from_numpy(draw_permutations(count, slots, rng=rng))


def first_view(changes: Changes, count: int) -> Changes:
    """Return what is done to the clips of the first view."""
    blur, flip = (None if part is None else part[:count] for part in (changes.blur_sigma, changes.flip))
    return Changes(changes.color[:count], changes.grey[:count], blur, flip)
