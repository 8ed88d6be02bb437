"""Inception-3D for RGB (Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017), without its classifier.

The parts have the names of the published TensorFlow network, so that its weights are found by name. Three of its habits
are kept, because the weights were trained with them: padding is TensorFlow's SAME, which puts the odd pixel at the end;
batch norm has no scale, and an epsilon of 1e-3; the last pooling averages over windows of two frames.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Triple = tuple[int, int, int]

_INCEPTION = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels in each module: of branch 0; inside and out of branch 1 and branch 2; of branch 3."""


class _SamePad(nn.Module):
    """Zeros around a clip, as TensorFlow's SAME puts them for a kernel and stride.

    What is pooled here is never negative, so zeros do not change a maximum.
    """

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Pad (N, C, t, h, w) on its last three axes."""
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel[::-1], self.stride[::-1], strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads)


class _UnscaledNorm(nn.BatchNorm3d):
    """Batch norm with a bias and no scale."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        del self.weight
        self.register_buffer("weight", torch.ones(channels), persistent=False)


def _unit(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU. At stride 1 SAME is the same on both sides."""
    parts: list[tuple[str, nn.Module]] = []
    if stride > 1:
        parts.append(("pad", _SamePad((kernel,) * 3, (stride,) * 3)))
    padding = kernel // 2 if stride == 1 else 0
    parts += [
        ("conv", nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)),
        ("norm", _UnscaledNorm(out_channels)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    return nn.Sequential(OrderedDict(parts))


def _pool(kernel: Triple, stride: Triple) -> nn.Sequential:
    return nn.Sequential(_SamePad(kernel, stride), nn.MaxPool3d(kernel, stride))


def _named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


class _Inception(nn.Module):
    """Four branches side by side, joined along the channels."""

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        one, inner_1, out_1, inner_2, out_2, pooled = channels
        self.branches = ("Branch_0", "Branch_1", "Branch_2", "Branch_3")
        for name, branch in zip(
            self.branches,
            (
                _named(Conv3d_0a_1x1=_unit(in_channels, one, 1)),
                _named(Conv3d_0a_1x1=_unit(in_channels, inner_1, 1), Conv3d_0b_3x3=_unit(inner_1, out_1, 3)),
                _named(Conv3d_0a_1x1=_unit(in_channels, inner_2, 1), Conv3d_0b_3x3=_unit(inner_2, out_2, 3)),
                _named(
                    MaxPool3d_0a_3x3=nn.MaxPool3d(3, 1, padding=1),
                    Conv3d_0b_1x1=_unit(in_channels, pooled, 1),
                ),
            ),
            strict=True,
        ):
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, t, h, w) to (N, C_out, t, h, w)."""
        return torch.cat([getattr(self, name)(x) for name in self.branches], dim=1)


class PairMean(nn.Module):
    """The mean of every two neighbouring frames; with the mean over time that follows, inner frames count twice."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, t, h, w) to (N, C, t - 1, h, w); a single frame stays."""
        return F.avg_pool3d(x, (2, 1, 1), stride=1) if x.shape[2] > 1 else x


def i3d() -> nn.Module:
    """Build the network with random weights: (N, 3, T, H, W) to (N, 1024, t, h, w); 32x224x224 becomes 3x7x7."""
    parts: dict[str, nn.Module] = {
        "Conv3d_1a_7x7": _unit(3, 64, 7, stride=2),
        "MaxPool3d_2a_3x3": _pool((1, 3, 3), (1, 2, 2)),
        "Conv3d_2b_1x1": _unit(64, 64, 1),
        "Conv3d_2c_3x3": _unit(64, 192, 3),
        "MaxPool3d_3a_3x3": _pool((1, 3, 3), (1, 2, 2)),
    }
    width = 192
    for name, channels in _INCEPTION.items():
        if name == "Mixed_4b":
            parts["MaxPool3d_4a_3x3"] = _pool((3, 3, 3), (2, 2, 2))
        if name == "Mixed_5b":
            parts["MaxPool3d_5a_2x2"] = _pool((2, 2, 2), (2, 2, 2))
        parts[name] = _Inception(width, channels)
        width = channels[0] + channels[2] + channels[4] + channels[5]
    return _named(**parts, AvgPool3d_6a=PairMean())
