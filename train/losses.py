"""The losses of the method's paper, as pure functions of tensors.

Zhang, She, Shen and Wang, "Inter-intra Variant Dual Representations for Self-supervised Video Recognition", BMVC 2021
(arXiv 2107.01194). The formulas are those of its published code (github.com/lzhangbj/DualVar, ``model/simclr.py`` and
``model/moco.py``), written anew; where a loss is older than the paper, its own source is named with its equation.

Everything here is fp32 and takes unit vectors; callers leave autocast first, since near a cosine of 1 bf16 resolves
only 0.004, which the temperatures turn into 0.08. Shapes: B videos, S slots or segments, D features, K queue entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows(NamedTuple):
    """Two views of every video: those of this process, among those of all."""

    own: Tensor
    """(2, B, D)."""

    every: Tensor
    """(2, N, D): of all processes, in the order of their ranks; ``own`` itself where there is but one."""

    offset: int = 0
    """Place of the first own video among all."""


def rows(a0: Tensor, a1: Tensor) -> Rows:
    """Return the rows of a single process from two views (B, D)."""
    own = torch.stack([a0, a1])
    return Rows(own, own)


def nt_xent_similarities(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the similarities behind ``nt_xent`` and where each row's positive is.

    Returns:
        (2B, 2N) dot products of the own rows, view by view, with all, -inf where a row meets itself; and (2B,) the
        positive's column.
    """
    count, total = rows.own.shape[1], rows.every.shape[1]
    places = torch.arange(count, device=rows.own.device) + rows.offset
    itself = torch.cat([places, places + total])
    columns = torch.arange(2 * total, device=rows.own.device)
    similarities = rows.own.flatten(0, 1) @ rows.every.flatten(0, 1).mT
    similarities = similarities.masked_fill(columns == itself[:, None], -torch.inf)
    return similarities, itself.roll(count)


def nt_xent(rows: Rows, *, temperature: float) -> Tensor:
    """Contrast videos with each other: the clip loss on embeddings, the temporal-coherent loss on slot means.

    Each own row must find the other view of its video among all other rows (cross-entropy, mean over own rows):
    equation 1 of Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, which
    the paper uses for its SimCLR form. The mean over processes of equal batches is the loss of the batches together.

    Args:
        rows: Need not be of unit length: slot means are not.
        temperature: Softmax temperature, above 0.

    Returns:
        Scalar.
    """
    similarities, positives = nt_xent_similarities(rows)
    return F.cross_entropy(similarities / temperature, positives)


def info_nce_queue(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float, ignore: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Contrast queries with their own key and with a queue of earlier keys: the clip loss in its MoCo form.

    Equation 1 of He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020.

    Args:
        q: (B, D) queries.
        k: (B, D) keys, one positive per query.
        queue: (K, D) negatives.
        temperature: Softmax temperature, above 0.
        ignore: bool (B, K), True where a queue entry comes from the query's own video and must not be a
            negative.

    Returns:
        The loss, and the share of queries whose key is nearer than every negative, where all are equal none; both
        scalar.
    """
    negatives = q @ queue.mT
    if ignore is not None:
        negatives = negatives.masked_fill(ignore, -torch.inf)
    logits = torch.cat([(q * k).sum(dim=-1, keepdim=True), negatives], dim=1) / temperature
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    nearest = logits.detach()
    first = nearest[:, 0] > nearest[:, 1:].amax(dim=1)
    return F.cross_entropy(logits, target), first.float().mean()


def shuffle_segments(video: Tensor, permutation: Tensor) -> Tensor:
    """Reorder the segments of every clip; frames inside a segment keep their order.

    Args:
        video: (B, T, ...) clips, S divides T.
        permutation: int64 (B, S); place i receives segment ``permutation[:, i]``.

    Returns:
        The same shape as ``video``.
    """
    count, segments = permutation.shape
    parts = video.reshape(count, segments, -1, *video.shape[2:])
    rows = torch.arange(count, device=video.device)[:, None]
    return parts[rows, permutation].reshape(video.shape)


def calibrate(slots: Tensor, permutation: Tensor) -> Tensor:
    """Put the slots of a shuffled clip back, so that slot s stands for the original segment s again.

    This inverts ``shuffle_segments``. Gathering with ``permutation`` once more would be wrong from S = 3 on.

    Args:
        slots: (B, S, D) slots of the shuffled clips.
        permutation: int64 (B, S), as given to ``shuffle_segments``.

    Returns:
        (B, S, D).
    """
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    return slots[rows, permutation.argsort(dim=1)]


class Ranking(NamedTuple):
    """The comparisons behind ``shuffle_rank``: for every anchor, each negative against the positive."""

    margins: Tensor
    """(B, 2S, 2S) cosine of anchor r and vector s minus cosine of anchor r and its positive."""

    negative: Tensor
    """bool (2S, 2S), True where s is a negative of r: neither r itself nor its positive."""


def rank(q: Tensor, p: Tensor) -> Ranking:
    """Compare all slots of a clip and of its shuffled, calibrated counterpart.

    Args:
        q: (B, S, D) unit slots of the clip.
        p: (B, S, D) unit slots of the counterpart, after ``calibrate``.
    """
    slots = q.shape[1]
    vectors = torch.cat([q, p], dim=1)  # (B, 2S, D)
    cosines = vectors @ vectors.mT  # (B, 2S, 2S)
    anchors = torch.arange(2 * slots, device=q.device)
    partners = anchors.roll(-slots)  # the same segment in the other clip
    negative = anchors % slots != anchors[:, None] % slots  # another segment, of either clip
    return Ranking(cosines - cosines[:, anchors, partners].unsqueeze(-1), negative)


def shuffle_rank(q: Tensor, p: Tensor, *, theta: float, clamp: float | None) -> Tensor:
    """Make slots follow their segments: nearer to the same segment elsewhere than to any other segment.

    The paper's shuffle-rank loss for one pair of clips: the mean softplus of (negative - positive) / theta over all
    anchors and all negatives of their video.

    Args:
        q: (B, S, D) unit slots of a clip, S >= 2.
        p: (B, S, D) unit slots of its shuffled, calibrated counterpart.
        theta: Temperature, above 0.
        clamp: Upper bound before the softplus, after division by theta; terms above it have no gradient.
            None: no bound.

    Returns:
        Scalar: about 0 when perfect, ln 2 when all slots are equal.
    """
    ranking = rank(q, p)
    scaled = ranking.margins / theta
    if clamp is not None:
        scaled = scaled.clamp(max=clamp)
    # Multiplied rather than indexed: boolean indexing has a shape that depends on data.
    terms = F.softplus(scaled) * ranking.negative
    return terms.sum() / (len(q) * ranking.negative.sum())


@torch.no_grad()
def contrast_top1(rows: Rows) -> Tensor:
    """Share of rows to which the other view of their video is nearer than every other row."""
    similarities, positives = nt_xent_similarities(rows)
    own = similarities.gather(1, positives[:, None])
    # Of as many as are as near, one or more is another row: where all embeddings fall together, none is found.
    return ((similarities >= own).sum(dim=1) == 1).float().mean()


@torch.no_grad()
def ranking_accuracy(q: Tensor, p: Tensor) -> Tensor:
    """Share of comparisons across the two clips in which the same segment is nearer than another; ties are half.

    An encoder that does not see order scores 0.5 where all orders are as likely: it is right when chance left the
    segments in place.

    Returns:
        (B,), for each video.
    """
    ranking = rank(q, p)
    first = torch.arange(2 * q.shape[1], device=q.device) < q.shape[1]
    across = ranking.negative & (first[:, None] != first)
    wins = (ranking.margins < 0).float() + 0.5 * (ranking.margins == 0).float()
    return (wins * across).sum(dim=(1, 2)) / across.sum()


@torch.no_grad()
def clamped_fraction(q: Tensor, p: Tensor, *, theta: float, clamp: float) -> Tensor:
    """Share of the comparisons above the clamp of ``shuffle_rank``, which have no gradient."""
    ranking = rank(q, p)
    above = (ranking.margins / theta > clamp) & ranking.negative
    return above.float().sum() / (len(q) * ranking.negative.sum())


@torch.no_grad()
def alignment(a0: Tensor, a1: Tensor) -> Tensor:
    """Mean squared distance of the two views of a video: 0 when they fall together, 2 for unrelated unit vectors.

    This and ``uniformity`` are of Wang and Isola, "Understanding Contrastive Representation Learning through Alignment
    and Uniformity on the Hypersphere", ICML 2020.
    """
    return (a0 - a1).square().sum(dim=-1).mean()


@torch.no_grad()
def uniformity(vectors: Tensor) -> Tensor:
    """Log of the mean of exp(-2 d²) over all pairs of videos: 0 when all fall together, about -4 when spread evenly."""
    count = len(vectors)
    squared = 2.0 - 2.0 * (vectors @ vectors.mT)
    same = torch.eye(count, dtype=torch.bool, device=vectors.device)
    return torch.exp(-2.0 * squared).masked_fill(same, 0.0).sum().div(count * (count - 1)).log()


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """How many directions features (N, F) spread in: (sum of variances)² / sum of their squares, from 1 to N - 1.

    Variances are those along principal axes; both sums are traces, so that no decomposition is needed. 0 where all
    features are equal.
    """
    centred = features - features.mean(dim=0)
    gram = centred @ centred.mT
    return gram.trace().square() / gram.square().sum().clamp_min(1e-30)
