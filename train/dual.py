"""One step of dual-representation learning: encode the views of a batch, compute losses and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy.models.network import VideoModel
from train import losses
from train.augment import augment
from train.config import DualConfig, RunConfig


@dataclass(frozen=True, slots=True)
class DualOutputs:
    """Embeddings of the three views of B videos, and of the shuffled third view."""

    feature: Tensor
    """(3, B, F) pooled backbone features."""

    clip: Tensor
    """(3, B, clip_dim) unit clip embeddings."""

    slots: Tensor
    """(3, B, S, D) unit slots."""

    shuffled: Tensor
    """(B, S, D) slots of the segment-shuffled view 2, put back in the order of the segments."""


def encode(model: VideoModel, video: Tensor, *, bf16: bool) -> Tensor:
    """Return float32 features (N, F); the backbone alone may run in bfloat16."""
    with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
        feature = model.encode(video)
    return feature.float()


def encode_views(
    model: VideoModel, views: np.ndarray, config: RunConfig, *, rng: np.random.Generator
) -> DualOutputs:
    """Augment and encode a batch: the three views in one pass, the shuffled third view in a second one.

    Args:
        model: In training mode.
        views: uint8 (3, B, T, H, W, 3) from ``train.data.dual_views``.
        config: Augmentation and precision.
        rng: Source of all randomness.
    """
    count, slots = views.shape[1], model.spec.num_slots
    plain = np.zeros(views.shape[:2], dtype=bool)
    plain[0] = rng.random(count) < config.augment.plain_probability
    device = model.scale.device
    flat = torch.from_numpy(views).to(device).flatten(0, 1)  # (3B, T, H, W, 3), view-major
    video = augment(flat, config.augment, rng=rng, plain=plain.ravel())
    feature = encode(model, video, bf16=config.bf16)
    drawn = rng.permuted(np.tile(np.arange(slots), (count, 1)), axis=1)  # the identity may come up
    permutation = torch.from_numpy(drawn).to(device)
    shuffled = losses.shuffle_segments(video[2 * count :], permutation)
    shuffled_slots = model.series_head(encode(model, shuffled, bf16=config.bf16))
    return DualOutputs(
        feature=feature.view(3, count, -1),
        clip=model.clip_head(feature).view(3, count, -1),
        slots=model.series_head(feature).view(3, count, slots, -1),
        shuffled=losses.calibrate(shuffled_slots, permutation),
    )


def dual_loss(outputs: DualOutputs, config: DualConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the losses, and the metrics to watch.

    ``L = clip + coherence + (rank(q0, p) + rank(q2, p)) / 2`` with the weights of ``config``: q0 shares the
    frames of p under another augmentation (``cross``), q2 also its pixels (``same``). A start at chance
    ranking is normal: until the encoder sees order, all comparisons of truly shuffled clips are beyond the
        clamp and have no gradient.
    """
    q, p, clamp = outputs.slots, outputs.shuffled, config.rank_clamp or None
    terms = {
        "loss_clip": losses.nt_xent(outputs.clip[0], outputs.clip[1], temperature=config.clip_temperature),
        "loss_coherence": losses.temporal_coherent(q[0], q[1], temperature=config.coherence_temperature),
    }
    total = config.clip_weight * terms["loss_clip"] + config.coherence_weight * terms["loss_coherence"]
    if config.rank_weight:
        for name, view in (("cross", q[0]), ("same", q[2])):
            loss = losses.shuffle_rank(view, p, theta=config.rank_theta, clamp=clamp)
            terms[f"loss_rank_{name}"] = loss
            total = total + 0.5 * config.rank_weight * loss
    return total, terms | _watch(outputs, config)


@torch.no_grad()
def _watch(outputs: DualOutputs, config: DualConfig) -> dict[str, Tensor]:
    q, p = outputs.slots, outputs.shuffled
    slots = q.shape[2]
    inter = q.mean(dim=2)  # (3, B, D)
    metrics = {
        "clip_top1": losses.contrast_top1(outputs.clip[0], outputs.clip[1]),
        "coherence_top1": losses.contrast_top1(inter[0], inter[1]),
        "inter_norm": inter.norm(dim=-1).mean(),
    }
    if slots > 1:
        cosines = (q @ q.mT).mean(dim=(0, 1))  # (S, S)
        metrics["slot_cosine"] = (cosines.sum() - cosines.trace()) / (slots * (slots - 1))
        metrics["rank_accuracy"] = losses.ranking_accuracy(q[0], p)
        if config.rank_clamp:
            metrics["clamped_share"] = losses.clamped_fraction(
                q[0], p, theta=config.rank_theta, clamp=config.rank_clamp
            )
    return metrics
