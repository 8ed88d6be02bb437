"""The clips of a batch through the network, and the dual losses of what it gives.

B is the number of videos, S of slots, V of views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ivdr_deploy.models.network import VideoModel
from train import losses
from train.augment import Changes, apply_changes
from train.distributed import gather, rank
from train.method import DualConfig

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
"""Scalar with a graph, and scalars to log."""


class Encoded(NamedTuple):
    """What the network gives for one view of B videos."""

    feature: Tensor
    """(B, F) pooled backbone features."""

    clip: Tensor
    """(B, clip_dim) unit clip embeddings."""

    slots: Tensor
    """(B, S, D) unit slots."""


class DualOutputs(NamedTuple):
    """The views of B videos; those that were not encoded are None."""

    first: Encoded | None = None
    second: Encoded | None = None
    """Of other moments than ``first``."""

    again: Encoded | None = None
    """Of the frames of ``first``, changed in another way."""

    shuffled: Tensor | None = None
    """(B, S, D) slots of the segment-shuffled ``again``, put back in the order of the segments."""


class Queue(NamedTuple):
    """Keys of earlier videos."""

    clip: Tensor
    """(K, clip_dim)."""

    means: Tensor
    """(K, D) slot means."""

    same: Tensor
    """bool (B, K): entries of the query's own video."""


def encode(model: VideoModel, video: Tensor, *, bf16: bool) -> Tensor:
    """Return float32 features (N, F); the backbone alone may run in bfloat16."""
    with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
        feature = model.encode(video)
    return feature.float()


def changed_clips(views: Tensor, changes: Changes, permutation: Tensor) -> dict[str, Tensor]:
    """Augment the views of a batch, and shuffle the segments of the third: float (B, T, H, W, 3) by name."""
    video = apply_changes(views.flatten(0, 1), changes).view(views.shape)
    clips = dict(zip(("first", "second", "again"), video, strict=False))
    if "again" in clips:
        clips["shuffled"] = losses.shuffle_segments(clips["again"], permutation)
    return clips


def passes(config: DualConfig) -> list[list[str]]:
    """Say which clips go through the network together and share batch statistics, where one network sees all."""
    if not config.ranks:
        return [["first", "second"]]
    shown, shuffled = ["first", "second", "again"], ["shuffled"]
    return [shown + shuffled] if config.bn_batches == "joint" else [shown, shuffled]


def query_passes(config: DualConfig) -> list[list[str]]:
    """Say the same for the queries of ``MocoStep``, whose view 1 is a key."""
    if not config.ranks:
        return [["first"]]
    shown, rest = ["first"], ["again", "shuffled"]
    return [shown + rest] if config.bn_batches == "joint" else [shown, rest]


def encode_clips(
    model: VideoModel,
    clips: Mapping[str, Tensor],
    permutation: Tensor,
    passes: Sequence[Sequence[str]],
    *,
    bf16: bool,
) -> DualOutputs:
    """Encode the clips of ``changed_clips`` that some passes name."""
    assert model.clip_head is not None
    assert model.series_head is not None
    found: dict[str, Encoded] = {}
    for names in passes:
        feature = encode(model, torch.cat([clips[name] for name in names]), bf16=bf16)
        every = (feature, model.clip_head(feature), model.series_head(feature))
        parts = zip(*(value.chunk(len(names)) for value in every), strict=True)
        found |= {name: Encoded(*part) for name, part in zip(names, parts, strict=True)}
    shuffled = found.pop("shuffled", None)
    put_back = None if shuffled is None else losses.calibrate(shuffled.slots, permutation)
    return DualOutputs(**found, shuffled=put_back)


def dual_loss(
    outputs: DualOutputs,
    permutation: Tensor,
    config: DualConfig,
    *,
    contrast: Tensor | None = None,
    queue: Queue | None = None,
) -> LossAndMetrics:
    """Return the weighted sum of the losses, and the metrics to watch.

    ``L = clip + coherence + (rank(q0, p) + rank(q2, p)) / 2`` with the weights of ``config``, as far as its mode has
    them. q0 shares the frames of p under another augmentation (``cross``), q2 also its pixels (``same``).

    Args:
        outputs: The embeddings.
        permutation: int64 (B, S), as for ``DualStep``.
        config: Which losses, weights and temperatures.
        contrast: Scalar that the losses beside shuffle-rank are multiplied by; None: 1.
        queue: Negatives of the contrast; None: the other videos of the batch.
    """
    assert outputs.first is not None
    assert outputs.second is not None
    q0, q1 = outputs.first.slots, outputs.second.slots
    terms: dict[str, Tensor] = {}
    total = outputs.first.feature.new_zeros(())
    means = q0.mean(dim=1), q1.mean(dim=1)
    for name, (one, other), weight, temperature in (
        ("clip", (outputs.first.clip, outputs.second.clip), config.clip_weight, config.clip_temperature),
        ("coherence", means, config.coherence_weight, config.coherence_temperature),
    ):
        if name == "coherence" and not config.contrasts_slots:
            continue
        if queue is None:
            pair = _rows(one, other)
            loss, top1 = losses.nt_xent(pair, temperature=temperature), losses.contrast_top1(pair)
        else:
            keys = queue.clip if name == "clip" else queue.means
            ignore = queue.same if config.mask_same_video else None
            loss, top1 = losses.info_nce_queue(one, other, keys, temperature=temperature, ignore=ignore)
        terms |= {f"loss_{name}": loss, f"{name}_top1": top1}
        total = total + weight * loss
    if contrast is not None:
        total = total * contrast
    if config.ranks:
        assert outputs.again is not None
        assert outputs.shuffled is not None
        for name, view in (("cross", q0), ("same", outputs.again.slots)):
            clamp = config.rank_clamp or None
            loss = losses.shuffle_rank(view, outputs.shuffled, theta=config.rank_theta, clamp=clamp)
            terms[f"loss_rank_{name}"] = loss
            total = total + 0.5 * config.rank_weight * loss
    return total, {name: term.detach() for name, term in terms.items()} | _watch(outputs, permutation, config)


def _rows(one: Tensor, other: Tensor) -> losses.Rows:
    """Return two views (B, D) of the own videos, among those of all processes."""
    own = torch.stack([one, other])
    every = gather(own.transpose(0, 1)).transpose(0, 1)
    return losses.Rows(own, every, rank() * len(one))


@torch.no_grad()
def _watch(outputs: DualOutputs, permutation: Tensor, config: DualConfig) -> dict[str, Tensor]:
    first, second = outputs.first, outputs.second
    assert first is not None
    assert second is not None
    metrics = {
        "alignment": losses.alignment(first.clip, second.clip),
        "uniformity": losses.uniformity(first.clip),
        "effective_rank": losses.effective_rank(first.feature),
        "inter_norm": first.slots.mean(dim=1).norm(dim=-1).mean(),
    }
    slots = first.slots.shape[1]
    if slots > 1:
        cosines = (first.slots @ first.slots.mT).mean(dim=0)  # (S, S)
        metrics["slot_cosine"] = (cosines.sum() - cosines.trace()) / (slots * (slots - 1))
    if config.ranks and outputs.again is not None and outputs.shuffled is not None:
        p = outputs.shuffled
        moved = (permutation != torch.arange(slots, device=permutation.device)).any(dim=1)
        for name, view in (("", first.slots), ("_same", outputs.again.slots)):
            right = losses.ranking_accuracy(view, p)
            metrics[f"rank_accuracy{name}"] = right.mean()
            # 0 / 0 where chance left every clip in its order: no number, and the log leaves it out.
            metrics[f"swapped_accuracy{name}"] = (right * moved).sum() / moved.sum()
        chance = config.order_chance(slots)
        metrics["order_score"] = (metrics["rank_accuracy_same"] - chance) / (1.0 - chance)
        metrics["clamped_share"] = losses.clamped_fraction(
            first.slots, p, theta=config.rank_theta, clamp=config.rank_clamp or torch.inf
        )
    return metrics
