"""Named video backbones: normalised frames in, a feature map out. The model pools.

Every backbone takes float (N, 3, T, H, W) and returns (N, F, t, h, w). ``r2plus1d_10`` and ``r3d_10``, one
block per stage, ``r2plus1d_18_paper``, two, ``c3d`` and ``s3dg`` are those of the method's paper (Zhang et al.,
"Inter-intra Variant Dual Representations for Self-supervised Video Recognition", BMVC 2021); ``r2plus1d_18`` is
torchvision's, whose shortcuts are not factored. ``tiny`` is for demonstrations and tests on a CPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.models.hf import HfBackbone, describe
from ivdr_deploy.models.i3d import PairMean, i3d

Triple = tuple[int, int, int]
ConvFactory = Callable[..., nn.Module]
"""Called as ``make(in_channels, out_channels, kernel, stride=...)``; padding keeps the size at stride 1."""


def _plain_conv(
    in_channels: int, out_channels: int, kernel: Triple, *, stride: Triple = (1, 1, 1)
) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)


class FactoredConv(nn.Sequential):
    """A 3-D convolution split into a spatial and a temporal one, with BN and ReLU between: "(2+1)D".

    The width in between is chosen so that the pair has about as many parameters as the full convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Triple, *, stride: Triple = (1, 1, 1)
    ) -> None:
        k_t, k_h, k_w = kernel
        area = k_h * k_w
        middle = k_t * area * in_channels * out_channels // (area * in_channels + k_t * out_channels)
        super().__init__(
            _plain_conv(in_channels, middle, (1, k_h, k_w), stride=(1, *stride[1:])),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            _plain_conv(middle, out_channels, (k_t, 1, 1), stride=(stride[0], 1, 1)),
        )


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with BN, and a shortcut: a 1x1x1 convolution wherever the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: Triple, conv: ConvFactory) -> None:
        super().__init__()
        self.main = nn.Sequential(
            conv(in_channels, out_channels, (3, 3, 3), stride=stride),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
            conv(out_channels, out_channels, (3, 3, 3)),
            nn.BatchNorm3d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != (1, 1, 1):
            # The paper's R(2+1)D factors the shortcut too, unlike torchvision's; the count depends on it.
            self.shortcut = nn.Sequential(
                conv(in_channels, out_channels, (1, 1, 1), stride=stride), nn.BatchNorm3d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, t, h, w) to (N, C_out, t', h', w')."""
        return torch.relu(self.main(x) + self.shortcut(x))


def _resnet(conv: ConvFactory, *, blocks: int) -> nn.Module:
    """Stem and four stages of ``blocks`` blocks; 16x112x112 becomes 2x7x7."""
    stages = []
    width = 64
    for channels, step in ((64, 1), (128, 2), (256, 2), (512, 2)):
        stages.append(ResidualBlock(width, channels, stride=(step, step, step), conv=conv))
        same = (ResidualBlock(channels, channels, stride=(1, 1, 1), conv=conv) for _ in range(blocks - 1))
        stages += same
        width = channels
    return nn.Sequential(
        conv(3, 64, (3, 7, 7), stride=(1, 2, 2)), nn.BatchNorm3d(64), nn.ReLU(inplace=True), *stages
    )


def _c3d() -> nn.Module:
    """Eight plain convolutions with batch norm, halved by pooling; 16x112x112 becomes 2x7x7."""
    layers: list[nn.Module] = []
    width = 3
    for channels, pool in (
        (64, (1, 2, 2)), (128, (2, 2, 2)), (256, None), (256, (2, 2, 2)), (512, None), (512, (2, 2, 2)),
        (512, None), (512, None),
    ):  # fmt: skip
        layers += [nn.Conv3d(width, channels, 3, padding=1), nn.BatchNorm3d(channels), nn.ReLU(inplace=True)]
        if pool is not None:
            layers.append(nn.MaxPool3d(pool))
        width = channels
    return nn.Sequential(*layers)


class RemoveTemporalMean(nn.Module):
    """Subtract each pixel's mean over the clip: what stands still is gone, what moves stays."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, T, H, W) to the same shape, with a temporal mean of zero everywhere."""
        return x - x.mean(dim=2, keepdim=True)


def _tiny() -> nn.Module:
    """Half a million parameters, in plain 3-D convolutions: factored ones with batch norm between are no quicker.

    It sees motion only. On some hundred training videos a small network otherwise learns their backgrounds by
    heart: on the made figures of the demo, test accuracy stayed near chance without this, and passed 90 % with it.
    The stem quarters the picture at once, since at 64 px early layers dominate the time. Time is halved only once,
    after four temporal convolutions, so that order reaches the feature.
    """
    return nn.Sequential(
        RemoveTemporalMean(),
        _plain_conv(3, 32, (3, 7, 7), stride=(1, 4, 4)),
        nn.BatchNorm3d(32),
        nn.ReLU(inplace=True),
        ResidualBlock(32, 48, stride=(1, 2, 2), conv=_plain_conv),
        ResidualBlock(48, 96, stride=(2, 2, 2), conv=_plain_conv),
    )


def _torchvision_resnet(name: str) -> nn.Module:
    from torchvision.models import video

    network = getattr(video, name)(weights=None)
    return nn.Sequential(network.stem, network.layer1, network.layer2, network.layer3, network.layer4)


def _s3d() -> nn.Module:
    from torchvision.models import video

    features: nn.Module = video.s3d(weights=None).features
    return features


class SelfGate(nn.Module):
    """Weighs channels by what the whole clip shows: x * sigmoid(linear(mean of x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, t, h, w) to the same shape."""
        weights = torch.sigmoid(self.linear(x.mean(dim=(2, 3, 4))))
        return x * weights[:, :, None, None, None]


def _s3dg() -> nn.Module:
    """S3D with a gate at the end of every branch of its mixed blocks: "S3D-G"."""
    from torchvision.models.video import s3d

    features = _s3d()
    mixed = type(s3d(weights=None).features[5])
    for block in features.modules():
        if isinstance(block, mixed):
            for name in ("branch0", "branch1", "branch2", "branch3"):
                branch = getattr(block, name)
                last = [part for part in branch.modules() if isinstance(part, nn.Conv3d)][-1]
                gated = nn.Sequential(*_parts(branch), SelfGate(last.out_channels))
                setattr(block, name, gated)
    return features


def _parts(branch: nn.Module) -> list[nn.Module]:
    """Return the steps of a branch; a single step may be a sequence by another name."""
    return list(branch) if type(branch) is nn.Sequential else [branch]


def _s3d_paired() -> nn.Module:
    """S3D with torchvision's own pooling, which its published weights were trained with."""
    return nn.Sequential(_s3d(), PairMean())


class _MViT(nn.Module):
    """torchvision's MViT v2 S: its feature is the class token, as a feature map of one place."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import video

        self.network = video.mvit_v2_s(weights=None)
        self.network.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 16, 224, 224) to (N, 768, 1, 1, 1)."""
        token: Tensor = self.network(x)
        return token[:, :, None, None, None]


@dataclass(frozen=True, slots=True)
class Backbone:
    """One entry of the registry."""

    build: Callable[[], nn.Module]
    """Makes the network with random weights."""

    feature_dim: int
    """Channels of its feature map (F)."""

    min_frames: int = 1
    min_size: int = 1
    """Frames and pixels of the smallest clip that it takes. Below, a pooling layer would have nothing to give."""

    fixed_size: bool = False
    """Whether it takes clips of just that size, as a transformer with learned places does."""


BACKBONES: dict[str, Backbone] = {
    "r2plus1d_10": Backbone(partial(_resnet, FactoredConv, blocks=1), 512),
    "r3d_10": Backbone(partial(_resnet, _plain_conv, blocks=1), 512),
    "r2plus1d_18_paper": Backbone(partial(_resnet, FactoredConv, blocks=2), 512),
    "c3d": Backbone(_c3d, 512, min_frames=8, min_size=16),
    "r2plus1d_18": Backbone(partial(_torchvision_resnet, "r2plus1d_18"), 512),
    "r3d_18": Backbone(partial(_torchvision_resnet, "r3d_18"), 512),
    "i3d": Backbone(i3d, 1024),
    "s3d": Backbone(_s3d, 1024, min_frames=5, min_size=17),
    "s3dg": Backbone(_s3dg, 1024, min_frames=5, min_size=17),
    "mc3_18": Backbone(partial(_torchvision_resnet, "mc3_18"), 512),
    "s3d_paired": Backbone(_s3d_paired, 1024, min_frames=5, min_size=17),
    "mvit_v2_s": Backbone(_MViT, 768, min_frames=16, min_size=224, fixed_size=True),
    "tiny": Backbone(_tiny, 96),
}


def get_backbone(name: str, config: Mapping[str, Any] | None = None) -> Backbone:
    """Look a backbone up.

    Args:
        name: Its name; ``hf`` stands for the networks that ``models.hf`` builds from a configuration.
        config: That configuration.

    Raises:
        ConfigError: if there is none of that name, or the configuration is not one of its own.
    """
    if name == "hf":
        config = config or {}
        shape = describe(config)
        return Backbone(
            partial(HfBackbone, config),
            shape.feature_dim,
            min_frames=shape.num_frames,
            min_size=shape.size,
            fixed_size=True,
        )
    if config:
        raise ConfigError(f"the backbone {quoted(name)} takes no configuration", hint="it is for 'hf' only")
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean {quoted(near[0])}?" if near else f"known backbones: {', '.join(BACKBONES)}"
        raise ConfigError(f"unknown backbone {quoted(name)}", hint=hint)
    return BACKBONES[name]
