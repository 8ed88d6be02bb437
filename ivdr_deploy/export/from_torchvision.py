"""Video classifiers of torchvision, from a checkpoint file that was downloaded."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import get_model_weights

from ivdr_deploy._text import one_line, quoted
from ivdr_deploy.errors import CheckpointError, ConfigError
from ivdr_deploy.export.importing import Imported, assign_weights, read_file
from ivdr_deploy.export.torch_file import damage, foreign_name, is_packed, require_readable
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec, ViewPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class _Network:
    backbone: str
    num_frames: int
    fps: float
    num_clips: int
    renamed: tuple[tuple[str, str], ...]
    """Beginnings of torchvision's names, and ours in their place."""


_STAGES = ("stem.", "layer1.", "layer2.", "layer3.", "layer4.")
_RESNET = tuple((stage, f"backbone.{place}.") for place, stage in enumerate(_STAGES))
_resnet = partial(
    _Network, num_frames=16, fps=15.0, num_clips=5, renamed=(*_RESNET, ("fc.", "classifier.linear."))
)

NETWORKS = {
    "r3d_18": _resnet(backbone="r3d_18"),
    "r2plus1d_18": _resnet(backbone="r2plus1d_18"),
    "mc3_18": _resnet(backbone="mc3_18"),
    "s3d": _Network(
        backbone="s3d_paired",
        num_frames=128,
        fps=15.0,
        num_clips=1,
        renamed=(("features.", "backbone.0."), ("classifier.1.", "classifier.linear.")),
    ),
    "mvit_v2_s": _Network(
        backbone="mvit_v2_s",
        num_frames=16,
        fps=7.5,
        num_clips=5,
        renamed=(("head.1.", "classifier.linear."), ("", "backbone.network.")),
    ),
}
"""Clip length, frame rate and number of clips are those of the published accuracies; torchvision has them in prose only
(``meta["_docs"]``)."""


def read(name: str, weights: Path | None) -> Imported:
    """Read a checkpoint; resize, crop, mean, std and labels are those of torchvision's own weights.

    Args:
        name: Of the network, as torchvision spells it.
        weights: The file, a state dict that ``torch.save`` wrote.

    Raises:
        ConfigError: if there is no such network, or no file is given.
        CheckpointError: if the file cannot be read, or does not fit.
    """
    if name not in NETWORKS:
        raise ConfigError(
            f"unknown network {quoted(name)} of torchvision", hint=f"known: {', '.join(NETWORKS)}"
        )
    entry = get_model_weights(name).DEFAULT
    if weights is None:
        raise ConfigError(
            "torchvision's weights are not fetched", hint=f"download {entry.url}, then --weights FILE"
        )
    content, where = read_file(weights), one_line(weights)
    digest = hashlib.sha256(content).hexdigest()
    network, preset = NETWORKS[name], entry.transforms()
    clip = _contract(network, preset)
    labels = tuple(entry.meta["categories"])
    spec = ModelSpec(backbone=network.backbone, num_slots=0, clip_dim=0, num_classes=len(labels))
    model = build_model(spec, clip)
    found: dict[str, tuple[str, Tensor]] = {}
    for key, value in _state_dict(content, where).items():
        # S3D classifies by a convolution of one place.
        one_place = key.startswith("classifier.") and value.shape[2:] == (1, 1, 1)
        tensor = value.flatten(1) if one_place and value.layout is torch.strided else value
        if (target := _renamed(key, network)) in found:
            raise CheckpointError(
                f"{where} has two tensors for one place: {quoted(found[target][0])} and {quoted(key)}",
                hint="save model.state_dict() of torchvision's own network alone",
            )
        found[target] = (key, tensor)
    published = f"-{digest[:8]}." in entry.url  # torchvision puts the beginning of the digest into the name
    return Imported(
        model=model,
        clip=clip,
        view_plan=ViewPlan(num_clips=network.num_clips),
        labels=labels,
        origin={
            "model": f"{name} of torchvision",
            "published": entry.url if published else "unknown: not the published file",
            "file": one_line(weights.name),
            "sha256": digest,
            "licence": "BSD-3-Clause (torchvision); weights trained on Kinetics-400"
            if published
            else "unknown",
        },
        tensors=assign_weights(model, found, where=where),
        own_preprocess=lambda frames: _preset(preset, frames),
    )


def _contract(network: _Network, preset: Any) -> ClipSpec:
    size, (height, width) = preset.resize_size, preset.crop_size
    if height != width:
        raise ConfigError(f"the contract crops squares, the preset {height}x{width}")
    exact = (size[0], size[1]) if len(size) == 2 else None
    return ClipSpec(
        num_frames=network.num_frames,
        frame_stride=1,
        target_fps=network.fps,
        short_side=0 if exact else size[0],
        exact_size=exact,
        crop_size=height,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _preset(preset: Any, frames: np.ndarray) -> np.ndarray:
    """Run torchvision's own transforms on frames (T, H, W, 3); they give (3, T, h, w)."""
    done: Tensor = preset(torch.from_numpy(frames).permute(0, 3, 1, 2))
    return done.permute(1, 0, 2, 3).numpy()


def _state_dict(content: bytes, where: str) -> dict[str, Tensor]:
    """Read a state dict, without running anything in the file."""
    if is_packed(content):
        raise CheckpointError(
            f"{where} is packed, and unpacks to more than it holds",
            hint="give the file as torch.save wrote it, which packs nothing",
        )
    if found := damage(content):
        raise CheckpointError(
            f"{where} is damaged: {found}",
            hint="copy it again, or download it again",
        )
    try:
        require_readable(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the form of a file, which is an error below or none
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint) from error
    except Exception as error:
        # torch raises what it likes on damaged files, and its own text tells how to run the file.
        said = re.search(r"GLOBAL (\S+)", str(error))
        if foreign := said[1] if said else foreign_name(content):
            raise CheckpointError(
                f"{where} names {quoted(foreign)}, which reading it would run",
                hint="only tensors are read from such a file; do not trust it, and load it nowhere else",
            ) from error
        raise CheckpointError(
            f"{where} is not a readable file of torch.save ({type(error).__name__})",
            hint="it may be cut short, or saved with another pickle_protocol than torch's own: download it again",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and not value.is_nested
        for key, value in state.items()
    ):
        raise CheckpointError(
            f"{where} is not a state dict: expected tensors by name", hint="save model.state_dict() alone"
        )
    return state


def _renamed(key: str, network: _Network) -> str:
    for theirs, ours in network.renamed:
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
            break
    return key
