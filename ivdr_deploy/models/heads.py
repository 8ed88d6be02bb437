"""The heads: each reads the pooled backbone feature (N, F).

Vectors are brought to unit length in fp32: the epsilon of the division underflows in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _projection(feature_dim: int, out_dim: int) -> nn.Sequential:
    """Two layers without BN; on a pooled feature the paper's 1x1x1 convolutions are linear layers."""
    return nn.Sequential(
        nn.Linear(feature_dim, feature_dim), nn.ReLU(inplace=True), nn.Linear(feature_dim, out_dim)
    )


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors along the last axis to unit length, as ``F.normalize`` does.

    Its ``expand_as`` becomes arithmetic on shapes in an exported graph, which ONNX Runtime puts on the CPU whatever
    device was asked for.
    """
    scaled: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
    return scaled


def _norm(feature_dim: int, *, wanted: bool) -> nn.Module:
    """Batch norm without weights of its own, which takes away what all clips share; or nothing."""
    return nn.BatchNorm1d(feature_dim, affine=False) if wanted else nn.Identity()


def fold_norm(head: ClipHead | SeriesHead) -> None:
    """Put the norm in front of a head into its first layer, which then gives what it gives in eval mode."""
    norm, first = head.norm, head.projection[0]
    if not isinstance(norm, nn.BatchNorm1d):
        return
    assert isinstance(first, nn.Linear)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        weight = first.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        bias = first.bias.double() - weight @ norm.running_mean.double()
        first.weight.copy_(weight)
        first.bias.copy_(bias)
    head.norm = nn.Identity()


class ClipHead(nn.Module):
    """Embedding of the whole clip, for contrast between videos; used by pre-training only."""

    def __init__(self, feature_dim: int, *, clip_dim: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = _norm(feature_dim, wanted=norm)
        self.projection = _projection(feature_dim, clip_dim)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (N, F) to unit vectors (N, clip_dim)."""
        return unit(self.projection(self.norm(feature)).float())


class SeriesHead(nn.Module):
    """The dual representation: S slots per clip. Their mean is *inter*, the slots themselves are *intra*."""

    def __init__(self, feature_dim: int, *, num_slots: int, slot_dim: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = _norm(feature_dim, wanted=norm)
        self.num_slots = num_slots
        self.slot_dim = slot_dim
        self.projection = _projection(feature_dim, num_slots * slot_dim)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (N, F) to slots (N, S, D), each of unit length; slot s is output channels [D*s, D*(s+1))."""
        slots = self.projection(self.norm(feature)).unflatten(-1, (self.num_slots, self.slot_dim))
        return unit(slots.float())


class ClassifierHead(nn.Module):
    """Dropout and one linear layer."""

    def __init__(self, feature_dim: int, *, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(feature_dim, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (N, F) to logits (N, K)."""
        logits: Tensor = self.linear(self.dropout(feature))
        return logits.float()
