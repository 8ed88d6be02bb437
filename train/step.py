"""One step of training as one module, so that DDP and ``torch.compile`` see all of it: batch in, loss and metrics out.

Everything random is drawn outside, in ``train.data`` and ``train.augment``, and comes in as tensors: nothing in
``forward`` looks at a value, waits for the device, or has a shape that depends on data. B is the number of videos, S of
slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ivdr_deploy.models.network import VideoModel
from train import losses
from train.augment import Changes, apply_changes
from train.config import DualConfig

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
"""Scalar with a graph, and scalars to log."""


class DualStep(nn.Module):
    """Pre-training: the dual losses.

    Args:
        model: With a clip head and a series head; the weights that the step trains are those that require a gradient.
        config: Weights and temperatures.
        bf16: Run the backbone in bfloat16.
    """

    def __init__(self, model: VideoModel, config: DualConfig, *, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.bf16 = bf16

    def forward(self, views: Tensor, changes: Changes, permutation: Tensor) -> LossAndMetrics:
        """Compute the losses of a batch.

        Args:
            views: uint8 (3, B, T, H, W, 3) from ``train.data.dual_views``.
            changes: Augmentation of the 3B clips, view by view.
            permutation: int64 (B, S): order of the segments in which the third view is seen once more.
        """
        return dual_loss(encode_views(self.model, views, changes, permutation, bf16=self.bf16), self.config)


class LabelStep(nn.Module):
    """Fine-tuning with cross-entropy.

    Heads that it does not train are set to need no gradient.

    Args:
        model: With a classifier.
        bf16: Run the backbone in bfloat16.
    """

    def __init__(self, model: VideoModel, *, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16
        for part in (model.clip_head, model.series_head):
            if part is not None:
                part.requires_grad_(False)

    def forward(self, views: Tensor, changes: Changes, truth: Tensor) -> LossAndMetrics:
        """Compute the loss of a batch.

        Args:
            views: uint8 (B, T, H, W, 3).
            changes: Augmentation of the B clips.
            truth: int64 (B,) true classes.
        """
        feature = encode(self.model, apply_changes(views, changes), bf16=self.bf16)
        return label_loss(self.model, feature, truth)


class JointStep(nn.Module):
    """Fine-tuning with cross-entropy and the dual losses, so that every head goes along with the backbone.

    Args:
        model: With all heads.
        config: Weights and temperatures of the dual losses.
        dual_weight: Weight of their sum beside cross-entropy.
        bf16: Run the backbone in bfloat16.
    """

    def __init__(
        self, model: VideoModel, config: DualConfig, *, dual_weight: float, bf16: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.dual_weight = dual_weight
        self.bf16 = bf16

    def forward(self, views: Tensor, changes: Changes, permutation: Tensor, truth: Tensor) -> LossAndMetrics:
        """Compute the losses of a batch; every view carries its video's label.

        Args:
            views: uint8 (3, B, T, H, W, 3).
            changes: Augmentation of the 3B clips, view by view.
            permutation: int64 (B, S), as for ``DualStep``.
            truth: int64 (B,) true classes.
        """
        outputs = encode_views(self.model, views, changes, permutation, bf16=self.bf16)
        loss, metrics = label_loss(self.model, outputs.feature.flatten(0, 1), truth.repeat(len(views)))
        dual, dual_metrics = dual_loss(outputs, self.config)
        return loss + self.dual_weight * dual, metrics | dual_metrics


class DualOutputs(NamedTuple):
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
    model: VideoModel, views: Tensor, changes: Changes, permutation: Tensor, *, bf16: bool
) -> DualOutputs:
    """Augment and encode a batch: the three views in one pass, the shuffled third view in a second one."""
    assert model.clip_head is not None
    assert model.series_head is not None
    count, slots = permutation.shape
    video = apply_changes(views.flatten(0, 1), changes)  # (3B, T, H, W, 3), view-major
    feature = encode(model, video, bf16=bf16)
    shuffled = losses.shuffle_segments(video[2 * count :], permutation)
    shuffled_slots = model.series_head(encode(model, shuffled, bf16=bf16))
    return DualOutputs(
        feature=feature.view(3, count, -1),
        clip=model.clip_head(feature).view(3, count, -1),
        slots=model.series_head(feature).view(3, count, slots, -1),
        shuffled=losses.calibrate(shuffled_slots, permutation),
    )


def label_loss(model: VideoModel, feature: Tensor, truth: Tensor) -> LossAndMetrics:
    """Return the cross-entropy of features (N, F) against classes (N,), and the share that is right."""
    assert model.classifier is not None
    logits = model.classifier(feature)
    loss = F.cross_entropy(logits, truth)
    correct = (logits.detach().argmax(dim=-1) == truth).float().mean()
    return loss, {"loss_label": loss.detach(), "train_accuracy": correct}


def dual_loss(outputs: DualOutputs, config: DualConfig) -> LossAndMetrics:
    """Return the weighted sum of the losses, and the metrics to watch.

    ``L = clip + coherence + (rank(q0, p) + rank(q2, p)) / 2`` with the weights of ``config``; mode ``clip-sr-tc`` of
    the paper's code. q0 shares the frames of p under another augmentation (``cross``), q2 also its pixels (``same``).
    A start at chance ranking is normal: until the encoder sees order, all comparisons of truly shuffled clips are
    beyond the clamp and have no gradient.
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
    return total, {name: term.detach() for name, term in terms.items()} | _watch(outputs, config)


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
