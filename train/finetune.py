"""Supervised training on labels: fine-tuning, alone or jointly with the dual losses, and the linear probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ivdr_deploy._console import console
from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import ArtifactError, CheckpointError, DataError
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec, TrainingState
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.sampling import random_start_clip
from train.augment import Changes, draw_changes
from train.cache import CachedVideos
from train.config import DataConfig, FinetuneConfig
from train.data import draw_dual_batch, single_views
from train.evaluate import evaluate_model, open_in_memory
from train.run import (
    DrawBatch,
    begin_or_resume,
    decode_options,
    open_state,
    open_videos,
    run_folder,
    run_steps,
    start_run,
    write_checkpoint,
)
from train.step import JointStep, LabelStep


def finetune(config: FinetuneConfig) -> Path:
    """Train a classifier, and unless ``config.linear_probe`` the backbone with it.

    Goes on from the state in ``config.out`` if there is one.

    Returns:
        Path of the checkpoint. When ``config.data.test`` is given, its provenance holds the accuracy on that
        list under ``config.view_plan``.

    Raises:
        DataError: if a list is unusable, a label is missing, or the test list has a class of its own.
        CheckpointError: if ``config.init`` does not fit.
        ConfigError: if the settings do not fit together.
        DeviceError: if the device is not there.
        TrainingError: if training diverges.
        FolderError: if ``config.out`` holds another run, or one that has ended.
    """
    device = start_run(config)
    with run_folder(config):
        videos, test, labels = read_labelled_lists(config.data)
        spec = replace(config.model, num_classes=len(labels))
        model, before = (
            _transfer(Path(config.init), spec, config.clip, labels=labels)
            if config.init
            else (build_model(spec, config.clip), None)
        )
        cached = open_videos(config, videos)
        spec = model.spec
        model.to(device)
        if config.channels_last:
            model.backbone.to(memory_format=torch.channels_last_3d)
        step = _build_step(model, config).train()
        state = open_state(config, model, cached)
        begin_or_resume(config, state)
        draw = _batches(cached, VideoList(videos.source, cached.items).targets(labels), config)
        measured = run_steps(config, step, state, draw, count=len(cached), description="fine-tuning")

        training = training_state(before.training if before else TrainingState(), config, steps=state.step)
        if test is not None:
            info = CheckpointInfo(
                clip=config.clip, view_plan=config.view_plan, model=spec, labels=labels, training=training
            )
            opened = open_in_memory(model, info, device=config.device)
            measured |= _measure(opened, test, config)
        return write_checkpoint(
            config,
            model=model,
            videos=videos,
            cached=cached,
            labels=labels,
            training=training,
            metrics=measured,
            origin=before.provenance.origin if before else {},
        )


def _measure(model: LoadedModel, test: VideoList, config: FinetuneConfig) -> dict[str, float]:
    """Return the accuracy on the test list; a video that cannot be used is named, and counts as wrong."""
    limits = VideoLimits.allowing(config.data.allow_containers)
    report = evaluate_model(model, test, limits=limits, decode=decode_options(config))
    for uri, reason in report.failed:
        console.print(f"test video failed, counted as wrong: {uri}: {reason}", style="yellow", markup=False)
    return {
        "video_accuracy": report.video_accuracy.value,
        "clip_accuracy": report.clip_accuracy.value,
        "test_videos": report.video_accuracy.total,
        "test_videos_failed": len(report.failed),
    }


def _build_step(model: VideoModel, config: FinetuneConfig) -> nn.Module:
    if config.dual_weight:
        return JointStep(model, config.dual, dual_weight=config.dual_weight, bf16=config.bf16)
    return LabelStep(model, frozen=config.linear_probe, bf16=config.bf16)


def _batches(cached: CachedVideos, targets: list[int], config: FinetuneConfig) -> DrawBatch:
    """Return what draws the batches of ``_build_step``."""

    def draw(rows: np.ndarray, rng: np.random.Generator) -> Mapping[str, Tensor | Changes]:
        truth = torch.tensor([targets[row] for row in rows])
        if config.dual_weight:
            return draw_dual_batch(cached, rows, config, draw=random_start_clip, rng=rng) | {"truth": truth}
        views = single_views(cached, rows, config.clip, draw=random_start_clip, rng=rng)
        changes = draw_changes(config.augment, len(rows), rng=rng)
        return {"views": torch.from_numpy(views), "changes": changes, "truth": truth}

    return draw


def read_labelled_lists(data: DataConfig) -> tuple[VideoList, VideoList | None, tuple[str, ...]]:
    """Read the training list and, if named, the test list; return them and the class names in logit order.

    Raises:
        DataError: if a list is unusable, a label is missing, there is but one class, or the test list has a
            class that the training list does not.
    """
    videos = read_video_list(data.train, root=data.root or None, part="train")
    videos.require_labels()
    labels = videos.labels
    if len(labels) < 2:
        raise DataError(
            f"{videos.source} has one class only, {quoted(labels[0])}", hint="training needs at least two"
        )
    if not data.test:
        return videos, None, labels
    tests = read_video_list(data.test, root=data.root or None, part="test")
    tests.targets(labels)
    tests.require_files()
    return videos, tests, labels


def training_state(before: TrainingState, config: FinetuneConfig, *, steps: int) -> TrainingState:
    """Return how far each part is trained after ``steps`` more steps.

    Cross-entropy alone moves the backbone away under the other heads; the dual losses take them along; a
    linear probe moves nothing.
    """
    backbone_step = before.backbone_step + (0 if config.linear_probe else steps)
    trained = ["classifier"]
    if config.dual_weight:
        trained += config.dual.trained_heads
    return TrainingState(
        backbone_step=backbone_step, head_steps=before.head_steps | dict.fromkeys(trained, backbone_step)
    )


def _transfer(
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
    source = load_checkpoint(_checkpoint_of(path))
    theirs = source.info.model
    spec = replace(spec, backbone_config=spec.backbone_config or theirs.backbone_config)
    compared = ["backbone", "backbone_config"]
    compared += ["clip_dim"] if theirs.clip_dim else []
    compared += ["num_slots", "slot_dim"] if theirs.num_slots else []
    differences = [
        f"model.{name}: {quoted(getattr(theirs, name))} != {quoted(getattr(spec, name))}"
        for name in compared
        if getattr(theirs, name) != getattr(spec, name)
    ] + [
        f"clip.{name}: {getattr(source.info.clip, name)} != {getattr(clip, name)}"
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


def _checkpoint_of(path: Path) -> Path:
    """Return the checkpoint that a path stands for: itself, or the reference of a bundle."""
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
