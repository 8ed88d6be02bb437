"""What training starts from: the settings and the weights of a checkpoint or a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivdr_deploy._files import at_home
from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, read_checkpoint_info
from ivdr_deploy.errors import ArtifactError, CheckpointError
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec
from train.config import FinetuneConfig
from train.config_file import load_config

if TYPE_CHECKING:
    from ivdr_deploy.models.network import VideoModel

_OF_TRAINING = ("num_classes", "dropout")
"""Settings of a network that a new training does not take over."""


def load_finetune_config(
    path: str | Path, overrides: Sequence[str] = (), *, trying: bool = False
) -> FinetuneConfig:
    """Read settings; what they leave open of contract, view plan and network is as in the ``init`` that they name.

    Args:
        path: The file.
        overrides: See ``load_config``.
        trying: Whether ``init`` may be absent, as before the pre-training that is to make it. What is left open is then
            as by default.

    Raises:
        ConfigError: as ``load_config``.
        CheckpointError: if ``init`` is unusable.
        ArtifactError: if it is a bundle and unusable, or holds no checkpoint.
    """
    return load_config(FinetuneConfig, path, overrides, complete=partial(_as_in_init, trying=trying))


def _as_in_init(values: dict[str, Any], *, trying: bool) -> None:
    init = values.get("init")
    if not isinstance(init, str) or not init or (trying and not Path(at_home(init)).exists()):
        return
    info = read_checkpoint_info(checkpoint_of(Path(at_home(init))))
    theirs = {name: to_dict(getattr(info, name)) for name in ("clip", "view_plan", "model")}
    for name in _OF_TRAINING:
        del theirs["model"][name]
    for name, settings in theirs.items():
        given = values.get(name, {})
        if isinstance(given, dict):  # anything else is refused when all are read
            values[name] = settings | given


def transfer(
    path: Path, spec: ModelSpec, clip: ClipSpec, *, labels: tuple[str, ...]
) -> tuple[VideoModel, CheckpointInfo]:
    """Build the network of ``spec`` with backbone and dual heads from a checkpoint, every weight of them.

    A classifier for the same labels is carried over too, so that training can go on in stages. A head that the
    checkpoint does not have, as an imported one has no dual heads, begins with random weights.
    Stride, placement and size may change between the stages; what the network computes from a pixel may not.

    Args:
        path: A checkpoint, or a bundle, whose reference is taken.
        spec: The network; an empty ``backbone_config`` stands for that of the checkpoint.
        clip: The contract.
        labels: Classes, in logit order.

    Raises:
        CheckpointError: if the checkpoint is unusable, or was made for another network or normalisation.
        ArtifactError: if a bundle is unusable, or holds no checkpoint.
    """
    from ivdr_deploy.models.network import build_model

    source = load_checkpoint(checkpoint_of(path))
    theirs = source.info.model
    spec = replace(spec, backbone_config=spec.backbone_config or theirs.backbone_config)
    compared = ["backbone", "backbone_config"]
    compared += ["clip_dim"] if theirs.clip_dim else []
    compared += ["num_slots", "slot_dim"] if theirs.num_slots else []
    compared += ["head_norm"] if theirs.num_slots or theirs.clip_dim else []
    differences = [
        f"model.{name}: {quoted(getattr(theirs, name))} != {quoted(getattr(spec, name))}"
        for name in compared
        if getattr(theirs, name) != getattr(spec, name)
    ] + [
        f"clip.{name}: {quoted(getattr(source.info.clip, name))} != {quoted(getattr(clip, name))}"
        for name in ("num_frames", "color", "mean", "std")
        if getattr(source.info.clip, name) != getattr(clip, name)
    ]
    if differences:
        raise CheckpointError(
            f"{path} does not fit this training ({'; '.join(differences)})",
            hint="change the settings to those of the checkpoint, or choose another one",
        )
    model = build_model(spec, clip)
    carried = ["backbone", "clip_head", "series_head"]
    if source.info.labels == labels:
        carried.append("classifier")
    for name in carried:
        part, given = getattr(model, name), getattr(source.model, name)
        if part is not None and given is not None:
            part.load_state_dict(given.state_dict())
    return model, source.info


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint that a path stands for: itself, or the reference of a bundle.

    Raises:
        ArtifactError: if a bundle is unusable, or holds no checkpoint.
    """
    if not path.is_dir():
        return path
    bundle = open_bundle(path)
    reference = bundle.manifest.reference
    if reference is None or reference.runtime != "torch":
        raise ArtifactError(
            f"{path} holds no checkpoint to start from",
            hint="give the bundle that was exported, or its checkpoint",
        )
    return bundle.variant_file(reference)
