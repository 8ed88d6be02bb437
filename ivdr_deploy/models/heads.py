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


class ClipHead(nn.Module):
    """Embedding of the whole clip, for contrast between videos; used by pre-training only."""

    def __init__(self, feature_dim: int, *, clip_dim: int) -> None:
        super().__init__()
        self.projection = _projection(feature_dim, clip_dim)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (N, F) to unit vectors (N, clip_dim)."""
        return unit(self.projection(feature).float())


class SeriesHead(nn.Module):
    """The dual representation: S slots per clip. Their mean is *inter*, the slots themselves are *intra*."""

    def __init__(self, feature_dim: int, *, num_slots: int, slot_dim: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.slot_dim = slot_dim
        self.projection = _projection(feature_dim, num_slots * slot_dim)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (N, F) to slots (N, S, D), each of unit length; slot s is output channels [D*s, D*(s+1))."""
        slots = self.projection(feature).unflatten(-1, (self.num_slots, self.slot_dim))
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
