"""Supervised training on labels: fine-tuning, alone or jointly with the dual losses, and the linear probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import CheckpointError, DataError
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec, TrainingState
from ivdr_deploy.video.sampling import random_start_clip
from train.augment import augment
from train.config import FinetuneConfig
from train.data import CachedVideos, dual_views, single_views, steps_per_epoch
from train.dual import dual_loss, encode, encode_views
from train.evaluate import evaluate_model, open_in_memory
from train.optim import build_optimizer, learning_rate, take_step
from train.run import RunLog, open_videos, start_run, training_steps, write_checkpoint

StepLoss = Callable[[np.ndarray, np.random.Generator], tuple[Tensor, dict[str, Tensor]]]
"""Rows of a batch and a generator -> loss and metrics."""


def finetune(config: FinetuneConfig) -> Path:
    """Train a classifier, and unless ``config.linear_probe`` the backbone with it.

    Returns:
        Path of the checkpoint. When ``config.data.test`` is given, its provenance holds the accuracy on that
        list.

    Raises:
        DataError: if a list is unusable, a label is missing, or the test list has a class of its own.
        CheckpointError: if ``config.init`` does not fit.
        ConfigError: if the settings do not fit the machine, or training diverges.
    """
    device = start_run(config)
    videos, test, labels = read_labelled_lists(config.data.train, config.data.test)
    spec = replace(config.model, num_classes=len(labels))
    model, before = (
        _transfer(Path(config.init), spec, config.clip, labels=labels)
        if config.init
        else (build_model(spec, config.clip), None)
    )
    cached = open_videos(config, videos)
    model.to(device).train()
    if config.channels_last:
        model.backbone.to(memory_format=torch.channels_last_3d)
    if config.linear_probe:
        model.backbone.requires_grad_(False).eval()
    trained = model.classifier if config.linear_probe else model
    assert trained is not None
    optimizer = build_optimizer(trained.parameters(), config.optim)
    targets = torch.tensor(VideoList(videos.source, cached.items).targets(labels), device=device)
    step_loss = _joint_loss if config.dual_weight else _label_loss
    compute = step_loss(model, cached, targets, config)

    epoch_steps = steps_per_epoch(len(cached), batch_size=config.optim.batch_size)
    total_steps = epoch_steps * config.optim.epochs
    steps = training_steps(config.optim, count=len(cached), seed=config.seed, description="fine-tuning")
    with RunLog(Path(config.out), total_steps=total_steps, every=config.log_every) as log:
        for step, rows, rng in steps:
            loss, metrics = compute(rows, rng)
            lr = learning_rate(config.optim, step=step, epoch_steps=epoch_steps)
            take_step(optimizer, loss, lr=lr)
            log.add(step, {"loss": loss, **metrics, "lr": lr})

    training = training_state(before.training if before else TrainingState(), config, steps=total_steps)
    measured = dict(log.last)
    if test is not None:
        info = CheckpointInfo(clip=config.clip, model=spec, labels=labels, training=training)
        report = evaluate_model(open_in_memory(model, info, device=config.device), test)
        measured["video_accuracy"] = report.video_accuracy.value
        measured["clip_accuracy"] = report.clip_accuracy.value
    return write_checkpoint(
        config, model=model, videos=videos, cached=cached, labels=labels, training=training, metrics=measured
    )


def read_labelled_lists(train: str, test: str) -> tuple[VideoList, VideoList | None, tuple[str, ...]]:
    """Read the training list and, if named, the test list; return them and the class names in logit order.

    Raises:
        DataError: if a list is unusable, a label is missing, there is but one class, or the test list has a
            class that the training list does not.
    """
    videos = read_video_list(train)
    videos.require_labels()
    labels = videos.labels
    if len(labels) < 2:
        raise DataError(
            f"{videos.source} has one class only, {labels[0]!r}", hint="training needs at least two"
        )
    if not test:
        return videos, None, labels
    tests = read_video_list(test)
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

    A classifier for the same labels is carried over too, so that training can go on in stages.
    Stride, placement and size may change between the stages; what the network computes from a pixel may not.

    Raises:
        CheckpointError: if the checkpoint is unusable, or was made for another network or normalisation.
    """
    source = load_checkpoint(path)
    fields = ("backbone", "num_slots", "clip_dim", "slot_dim")
    differences = [
        f"model.{name}: {getattr(source.info.model, name)} != {getattr(spec, name)}"
        for name in fields
        if getattr(source.info.model, name) != getattr(spec, name)
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
        getattr(model, name).load_state_dict(getattr(source.model, name).state_dict())
    return model, source.info


def _label_loss(model: VideoModel, cached: CachedVideos, targets: Tensor, config: FinetuneConfig) -> StepLoss:
    def compute(rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        views = single_views(cached, rows, config.clip, draw=random_start_clip, rng=rng)
        video = augment(torch.from_numpy(views).to(targets.device), config.augment, rng=rng)
        with torch.set_grad_enabled(not config.linear_probe):
            feature = encode(model, video, bf16=config.bf16)
        return _cross_entropy(model, feature, targets[torch.from_numpy(rows)])

    return compute


def _joint_loss(model: VideoModel, cached: CachedVideos, targets: Tensor, config: FinetuneConfig) -> StepLoss:
    def compute(rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        views = dual_views(cached, rows, config.clip, draw=random_start_clip, rng=rng)
        outputs = encode_views(model, views, config, rng=rng)
        truth = targets[torch.from_numpy(rows)].repeat(len(outputs.feature))  # every view carries the label
        loss, metrics = _cross_entropy(model, outputs.feature.flatten(0, 1), truth)
        dual, dual_metrics = dual_loss(outputs, config.dual)
        return loss + config.dual_weight * dual, metrics | dual_metrics

    return compute


def _cross_entropy(model: VideoModel, feature: Tensor, truth: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    assert model.classifier is not None
    logits = model.classifier(feature)
    loss = F.cross_entropy(logits, truth)
    correct = (logits.detach().argmax(dim=-1) == truth).float().mean()
    return loss, {"loss_label": loss, "train_accuracy": correct}
