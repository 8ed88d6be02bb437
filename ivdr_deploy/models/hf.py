"""Video classifiers of Hugging Face's transformers as backbones: everything up to their last, linear layer.

The package is needed to build such a network, so for importing one and for its torch reference; what was exported runs
without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ivdr_deploy._optional import require
from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of classifier; all four end in ``classifier``, a linear layer."""

    network: str
    """Its class in transformers."""

    processor: str
    """The class of its own preprocessing."""

    pixels: str = "pixel_values"
    """Name of its input, normalised (N, T, 3, H, W)."""

    frames_key: str = "num_frames"
    size_key: str = "image_size"
    """Where its configuration has the frames and the pixels of a clip."""

    span: int = 64
    """Frames of the video that one clip of the published weights looks at; its configuration does not say."""


ARCHITECTURES = {
    "videomae": Architecture("VideoMAEForVideoClassification", "VideoMAEVideoProcessor"),
    "timesformer": Architecture("TimesformerForVideoClassification", "TimesformerVideoProcessor", span=256),
    "vivit": Architecture("VivitForVideoClassification", "VivitVideoProcessor"),
    "vjepa2": Architecture(
        "VJEPA2ForVideoClassification",
        "VJEPA2VideoProcessor",
        pixels="pixel_values_videos",
        frames_key="frames_per_clip",
        size_key="crop_size",
        span=128,
    ),
}
"""By ``model_type`` of their configuration."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a configuration says about the network's ends."""

    num_frames: int
    size: int
    feature_dim: int


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Look the architecture of a configuration up.

    Raises:
        ConfigError: if it is none of ``ARCHITECTURES``.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ConfigError(
            f"the configuration has the model_type {quoted(kind)}",
            hint=f"video classifiers that can be imported: {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[kind]


def describe(config: Mapping[str, Any]) -> Shape:
    """Read the shape of clip and feature from a configuration.

    Raises:
        ConfigError: if the architecture is unknown, or a key is missing or of another type.
    """
    found = architecture(config)
    values = []
    for key in (found.frames_key, found.size_key, "hidden_size"):
        value = config.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"the configuration has {quoted(value)} for {quoted(key)}, expected a positive whole number",
                hint="config.json is incomplete, or its pictures are not square",
            )
        values.append(value)
    return Shape(*values)


class HfBackbone(nn.Module):
    """A classifier without its last layer, with random weights.

    Args:
        config: What its ``config.json`` says.

    Raises:
        ConfigError: if transformers refuses the configuration.
        MissingDependencyError: if transformers is not installed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        found = architecture(config)
        network_class: Any = getattr(require("transformers", extra="hf"), found.network)
        try:
            self.network: nn.Module = network_class(network_class.config_class.from_dict(dict(config)))
        except Exception as error:  # transformers checks a configuration in many places
            raise ConfigError(f"transformers refuses the configuration ({quoted(str(error))})") from error
        self.network.classifier = nn.Identity()
        self.pixels = found.pixels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, T, H, W) to the feature as a map of one place, (N, F, 1, 1, 1)."""
        feature: Tensor = self.network(**{self.pixels: x.transpose(1, 2)}).logits
        return feature[:, :, None, None, None]
