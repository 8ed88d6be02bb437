"""The only definition of the network: normalise, backbone, pool, heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.models.backbones import get_backbone
from ivdr_deploy.models.heads import ClassifierHead, ClipHead, SeriesHead, fold_norm, unit
from ivdr_deploy.spec import ClipSpec, ModelSpec, Precision

_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class VideoModel(nn.Module):
    """Clips in, all representations out.

    The names of the children (``backbone``, ``clip_head``, ``series_head``, ``classifier``) prefix the keys
    of the state dict and are part of the checkpoint format.

    Args:
        spec: Which network to build.
        mean: Per-channel mean of pixel values in 0..1.
        std: Per-channel standard deviation of pixel values in 0..1.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, spec: ModelSpec, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        entry = get_backbone(spec.backbone, spec.backbone_config)
        self.spec = spec
        self.feature_dim = entry.feature_dim
        self.backbone = entry.build()
        self._dtype = torch.float32
        self.clip_head: ClipHead | None = None
        if spec.clip_dim:
            norm = spec.head_norm == "both"
            self.clip_head = ClipHead(self.feature_dim, clip_dim=spec.clip_dim, norm=norm)
        self.series_head: SeriesHead | None = None
        if spec.num_slots:
            self.series_head = SeriesHead(
                self.feature_dim,
                num_slots=spec.num_slots,
                slot_dim=spec.slot_dim,
                norm=spec.head_norm != "none",
            )
        self.classifier: ClassifierHead | None = None
        if spec.num_classes:
            self.classifier = ClassifierHead(
                self.feature_dim, num_classes=spec.num_classes, dropout=spec.dropout
            )
        # (x / 255 - mean) / std as one multiply-add. Not in the state dict: the contract holds them.
        shape = (1, 3, 1, 1, 1)
        std_tensor = torch.tensor(std, dtype=torch.float64)
        scale = 1.0 / (255.0 * std_tensor)
        offset = -torch.tensor(mean, dtype=torch.float64) / std_tensor
        self.register_buffer("scale", scale.float().reshape(shape), persistent=False)
        self.register_buffer("offset", offset.float().reshape(shape), persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        """Normalise, run the backbone and pool.

        Args:
            video: RGB in 0..255, uint8 or float, shape (N, T, H, W, 3).

        Returns:
            float (N, F), the globally averaged feature map.
        """
        x = video.to(self.scale.dtype)  # cast before the permute: TensorRT refuses to transpose uint8
        x = x.permute(0, 4, 1, 2, 3)  # (N, 3, T, H, W)
        x = x * self.scale + self.offset
        feature: Tensor = self.backbone(x.to(self._dtype)).float().mean(dim=(2, 3, 4))
        return feature

    def set_precision(self, precision: Precision) -> None:
        """Let the backbone compute in another precision; normalisation, pooling and heads stay in fp32.

        The sums of the pooling and the lengths of unit vectors lose too much in half precision, and cost nothing.

        Raises:
            ConfigError: for ``int8`` and ``fp8``, which are made from an exported graph.
        """
        if precision not in _DTYPES:
            raise ConfigError(f"torch has no network in {precision}", hint=f"it has {', '.join(_DTYPES)}")
        self._dtype = _DTYPES[precision]
        self.backbone.to(self._dtype)

    def heads(self, feature: Tensor) -> dict[str, Tensor]:
        """Compute every output from the pooled feature.

        Args:
            feature: (N, F) from ``encode``.

        Returns:
            ``feature`` (N, F); with a clip head ``clip`` (N, clip_dim), unit; with a series head ``inter`` (N, D), the
            mean of the slots, unit, and ``intra`` (N, S, D), the slots, each unit; with a classifier ``logits`` (N, K).
            All float32.
        """
        outputs = {"feature": feature.float()}
        if self.clip_head is not None:
            outputs["clip"] = self.clip_head(feature)
        if self.series_head is not None:
            slots = self.series_head(feature)
            outputs |= {"inter": unit(slots.mean(dim=1)), "intra": slots}
        if self.classifier is not None:
            outputs["logits"] = self.classifier(feature)
        return outputs

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Map clips, (N, T, H, W, 3) in 0..255, to the outputs of ``heads``."""
        return self.heads(self.encode(video))


class ExportNetwork(nn.Module):
    """The network with a fixed, ordered choice of outputs: what is traced and exported.

    Norms in front of heads are folded into them: engines then have one layer less to get right.

    Args:
        model: The network; in eval mode for an export.
        output_names: Keys of ``VideoModel.forward``.
    """

    def __init__(self, model: VideoModel, output_names: Sequence[str]) -> None:
        super().__init__()
        if model.spec.head_norm != "none":
            model = copy.deepcopy(model)
            for head in (model.clip_head, model.series_head):
                if head is not None:
                    fold_norm(head)
        self.model = model
        self.output_names = tuple(output_names)

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        """Return the chosen outputs, in order."""
        outputs = self.model(video)
        return tuple(outputs[name] for name in self.output_names)


def build_model(spec: ModelSpec, clip: ClipSpec) -> VideoModel:
    """Build a network with random weights.

    Args:
        spec: Which network.
        clip: The contract; gives the normalisation.

    Raises:
        ConfigError: if the backbone is unknown or needs a larger clip, or the clip cannot be cut into the slots'
            segments.
    """
    if spec.num_slots and clip.num_frames % spec.num_slots:
        raise ConfigError(
            f"num_slots {spec.num_slots} does not divide num_frames {clip.num_frames}",
            hint="every slot stands for an equal part of the clip; change one of the two",
        )
    entry = get_backbone(spec.backbone, spec.backbone_config)
    if clip.num_frames < entry.min_frames or clip.crop_size < entry.min_size:
        raise ConfigError(
            f"{spec.backbone} needs clips of at least {entry.min_frames} frames of {entry.min_size} pixels a side, "
            f"found {clip.num_frames} of {clip.crop_size}",
            hint="raise clip.num_frames or clip.crop_size, or choose another backbone",
        )
    if entry.fixed_size and (clip.num_frames, clip.crop_size) != (entry.min_frames, entry.min_size):
        raise ConfigError(
            f"{spec.backbone} takes clips of {entry.min_frames} frames of {entry.min_size} pixels a side only, "
            f"found {clip.num_frames} of {clip.crop_size}",
            hint="its places are learned; set clip.num_frames and clip.crop_size so, or choose another backbone",
        )
    return VideoModel(spec, mean=clip.mean, std=clip.std)
