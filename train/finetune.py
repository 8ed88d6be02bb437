"""Supervised training on labels: fine-tuning, alone or jointly with the dual losses, and the linear probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ivdr_deploy._console import print_text
from ivdr_deploy._text import quoted
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import ConfigError, DataError
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import CheckpointInfo, TrainingState
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.sampling import random_start_clip
from train.answers import VideoAnswer, units_of
from train.augment import Changes, draw_changes
from train.cache import CachedVideos
from train.choice import choose, describe
from train.config import DataConfig, FinetuneConfig
from train.data import Batch, draw_dual_batch, golden_clips, single_views
from train.distributed import gather_items, joined, own_device, shard, world_size
from train.evaluate import evaluate_model, open_in_memory
from train.groups import held_out_parts
from train.init import transfer
from train.loop import AfterLine, DrawBatch, run_steps
from train.probe import open_probe, train_probe
from train.report import EvaluationReport, report_on, say_measured
from train.run import (
    CHECKPOINT_NAME,
    begin_or_resume,
    decode_options,
    open_state,
    open_videos,
    prepare,
    run_folder,
    runs_bf16,
    start_run,
    write_checkpoint,
)
from train.run_page import cached_facts, page_of_failure, write_run_page
from train.step import JointStep, LabelStep
from train.validation import open_validation


def finetune(config: FinetuneConfig) -> Path:
    """Train a classifier, and unless ``config.linear_probe`` the backbone with it.

    Goes on from the state in ``config.out`` if there is one, and from the features that are kept.

    Returns:
        Path of the checkpoint. When ``config.data.test`` is given, its provenance holds the accuracy on that
        list under ``config.view_plan``; with ``config.against``, the accuracies on held-out groups.

    Raises:
        DataError: if a list is unusable, a label is missing, or the test list has a class of its own.
        CheckpointError: if ``config.init`` does not fit.
        ConfigError: if the settings do not fit together.
        DeviceError: if the device is not there.
        TrainingError: if training diverges.
        FolderError: if ``config.out`` holds another run, or one that has ended.
    """
    with joined(config.device):
        start_run(config)
        if world_size() > 1 and (config.linear_probe or config.against or config.data.validation):
            raise ConfigError(
                "linear_probe, against and data.validation run in one process",
                hint="start the same command without torchrun",
            )
        with run_folder(config):
            return _finetune(config)


def _finetune(config: FinetuneConfig) -> Path:
    videos, test, labels = read_labelled_lists(config.data)
    probe, measured = None, {}
    if config.linear_probe or config.against:
        parts = held_out_parts(videos, seed=config.seed)
        if config.against:
            chosen = choose(config, videos, labels, parts, train_on=_train)
            config, probe, measured = chosen.config, chosen.probe, chosen.metrics
            start_run(config)
        else:
            probe = open_probe(config, videos, labels, parts)
            print_text(f"{describe(config)}: {probe.held_out} of held-out videos")
    if probe is not None:
        return train_probe(config, probe, videos, test, labels, measured)
    return _train(config, videos, test, labels, measured)


def _train(
    config: FinetuneConfig,
    videos: VideoList,
    test: VideoList | None,
    labels: tuple[str, ...],
    measured: Mapping[str, float] | None = None,
) -> Path:
    """Train by steps over random clips, and write the checkpoint.

    Args:
        config: The settings.
        videos: The training list.
        test: The list to measure on, if there is one.
        labels: Classes, in logit order.
        measured: Metrics that are known already.
    """
    model, before = _network(config, labels)
    with open_videos(config, videos) as cached:
        return _train_on(config, model, before, cached, videos, test, labels, measured or {})


def _train_on(
    config: FinetuneConfig,
    model: VideoModel,
    before: CheckpointInfo | None,
    cached: CachedVideos,
    videos: VideoList,
    test: VideoList | None,
    labels: tuple[str, ...],
    measured: Mapping[str, float],
) -> Path:
    step = prepare(config, _build_step(model, config), own_device(config.device))
    state = open_state(config, step, cached)
    begin_or_resume(config, state)
    draw = _batches(cached, VideoList(videos.source, cached.items).targets(labels), config)

    def info_after(steps: int) -> CheckpointInfo:
        trained = training_state(before.training if before else TrainingState(), config, steps=steps)
        return CheckpointInfo(
            clip=config.clip, view_plan=config.view_plan, model=model.spec, labels=labels, training=trained
        )

    def write(info: CheckpointInfo, metrics: Mapping[str, float], name: str = CHECKPOINT_NAME) -> Path:
        return write_checkpoint(
            config,
            model=model,
            videos=videos,
            golden=golden_clips(cached, config.clip),
            labels=labels,
            training=info.training,
            metrics=metrics,
            origin=before.provenance.origin if before else {},
            name=name,
        )

    facts = cached_facts(cached)
    watch = open_validation(
        config, model, state, info_after=info_after, write=write, videos=videos, facts=facts
    )
    if watch is not None and watch.stopped:  # it ended early, and was stopped before its checkpoint
        metrics = state.metrics
    else:
        after_line = _go_on if watch is None else watch.after_line
        with page_of_failure(config, videos, facts):
            metrics = run_steps(
                config, step, state, draw, count=len(cached), description="fine-tuning", after_line=after_line
            )
    metrics = metrics | dict(measured) | (watch.metrics() if watch is not None else {})
    report, info = None, info_after(state.step)
    if test is not None:
        report = _measure(open_in_memory(model, info, device=config.device), test, config)
        metrics |= report.metrics()
    path = write(info, metrics)
    write_run_page(
        config, videos, state=f"ended after {state.step} steps", test=test, report=report, facts=facts
    )
    return path


def _go_on() -> AfterLine:
    return "go on"


def _network(config: FinetuneConfig, labels: tuple[str, ...]) -> tuple[VideoModel, CheckpointInfo | None]:
    """Return the network before its first step, and what it starts from."""
    spec = replace(config.model, num_classes=len(labels))
    if config.init:
        return transfer(Path(config.init), spec, config.clip, labels=labels)
    return build_model(spec, config.clip), None


def _measure(model: LoadedModel, test: VideoList, config: FinetuneConfig) -> EvaluationReport:
    """Measure on the test list; a video that cannot be used is named, and counts as wrong.

    Each of several processes measures its own share of the list.
    """
    limits = VideoLimits.allowing(config.data.allow_containers)
    share = replace(test, items=tuple(test.items[place] for place in shard(len(test.items))))
    own: list[VideoAnswer] = []
    if share.items:
        own += evaluate_model(model, share, limits=limits, decode=decode_options(config)).answers
    answers = gather_items(own, count=len(test.items))
    units, said = units_of(test.items)
    report = report_on(
        [replace(one, unit=unit) for one, unit in zip(answers, units, strict=True)],
        model.labels,
        model=str(model.path),
        data=str(test.source),
        contract_hash=model.contract_hash,
        plan=model.view_plan,
        units=said,
        left_out=test.left_out,
    )
    say_measured(report)
    return report


def _build_step(model: VideoModel, config: FinetuneConfig) -> nn.Module:
    if config.dual_weight:
        return JointStep(model, config.dual, dual_weight=config.dual_weight, bf16=runs_bf16(config))
    return LabelStep(model, bf16=runs_bf16(config))


def _batches(cached: CachedVideos, targets: list[int], config: FinetuneConfig) -> DrawBatch:
    """Return what draws the batches of ``_build_step``."""

    def draw(batch: Batch) -> Mapping[str, Tensor | Changes]:
        truth = torch.tensor([targets[row] for row in batch.own_rows])
        if config.dual_weight:
            return draw_dual_batch(cached, batch, config, draw=random_start_clip) | {"truth": truth}
        views = single_views(cached, batch, config.clip, draw=random_start_clip)
        changes = draw_changes(config.augment, len(batch.rows), rng=batch.whole()).take(batch.places)
        return {"views": torch.from_numpy(views), "changes": changes, "truth": truth}

    return draw


def read_labelled_lists(data: DataConfig) -> tuple[VideoList, VideoList | None, tuple[str, ...]]:
    """Read the training list and, if named, the test list; return them and the class names in logit order.

    Raises:
        DataError: if a list is unusable, a label is missing, there is but one class, or the test list has a
            class that the training list does not.
    """
    videos = read_video_list(data.train, root=data.root or None, part="train")
    labels = classes_of(videos)
    if not data.test:
        return videos, None, labels
    tests = read_video_list(data.test, root=data.root or None, part="test")
    tests.targets(labels)
    tests.require_files()
    return videos, tests, labels


def classes_of(videos: VideoList) -> tuple[str, ...]:
    """Return the classes of a training list, in logit order.

    Raises:
        DataError: if a label is missing, or there is but one class.
    """
    videos.require_labels()
    labels = videos.labels
    if len(labels) < 2:
        raise DataError(
            f"{videos.source} has one class only, {quoted(labels[0])}", hint="training needs at least two"
        )
    return labels


def training_state(before: TrainingState, config: FinetuneConfig, *, steps: int) -> TrainingState:
    """Return how far each part is trained after ``steps`` more steps.

    Cross-entropy alone moves the backbone away under the other heads; the dual losses take them along.
    """
    backbone_step = before.backbone_step + steps
    trained = ["classifier"]
    if config.dual_weight:
        trained += config.dual.trained_heads
    return TrainingState(
        backbone_step=backbone_step, head_steps=before.head_steps | dict.fromkeys(trained, backbone_step)
    )
