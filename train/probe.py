"""The linear probe: a classifier on kept features of a frozen backbone.

The classifier is a softmax regression with a penalty on its weights: the one under which held-out groups of the
training list are most probable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ivdr_deploy._console import say_left_out
from ivdr_deploy._files import sha256_file
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.errors import FolderError, IvdrError
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.registry import misfit
from ivdr_deploy.spec import CheckpointInfo, TrainingState, ViewPlan
from ivdr_deploy.video import PathSource, VideoLimits
from ivdr_deploy.video.clips import load_clips
from train.answers import answer, units_of
from train.cache import say_skipped, usable
from train.config import FinetuneConfig
from train.data import golden_rows
from train.evaluate import open_in_memory
from train.features import FrozenNetwork, video_outputs
from train.init import checkpoint_of, transfer
from train.regression import Linear, choose_penalty, fit
from train.report import EvaluationReport, report_on, say_measured
from train.run import decode_options, keep_settings, write_checkpoint
from train.run_page import write_run_page
from train.state import saved_states


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A frozen backbone, and what it sees in the training videos."""

    model: VideoModel
    before: CheckpointInfo
    """Of the checkpoint that the backbone is from."""

    backbone: FrozenNetwork
    items: tuple[VideoItem, ...]
    """The usable training videos."""

    features: tuple[np.ndarray, ...]
    """Of each, (clips, F)."""

    penalty: float
    held_out: Accuracy
    """On the parts that were held out; a video of them that cannot be used counts as wrong."""


def open_probe(
    config: FinetuneConfig, videos: VideoList, labels: tuple[str, ...], parts: Sequence[np.ndarray]
) -> Probe:
    """Compute what is missing of the features of the training list, and choose the penalty on held-out parts.

    Args:
        config: With ``init``.
        videos: The training list.
        labels: Classes, in logit order.
        parts: Rows of the list that are held out in turn; may be empty.

    Raises:
        DataError: if too many videos cannot be used.
    """
    path = Path(config.init)
    model, before = transfer(path, replace(config.model, num_classes=len(labels)), config.clip, labels=labels)
    model.requires_grad_(False)
    if config.channels_last:
        model.backbone.to(memory_format=torch.channels_last_3d)
    backbone = _frozen(config, path, model, before)
    say_left_out(videos.left_out)
    made = _features(config, videos, backbone)
    good, skipped = usable(videos, made, max_bad_share=config.data.max_bad_share)
    say_skipped(skipped)
    penalty, held_out = choose_penalty(made, videos.targets(labels), parts, num_classes=len(labels))
    return Probe(
        model=model,
        before=before,
        backbone=backbone,
        items=tuple(item for item, _ in good),
        features=tuple(feature for _, feature in good),
        penalty=penalty,
        held_out=held_out,
    )


def train_probe(
    config: FinetuneConfig,
    probe: Probe,
    videos: VideoList,
    test: VideoList | None,
    labels: tuple[str, ...],
    measured: dict[str, float],
) -> Path:
    """Fit the classifier to all training videos, measure it on the test list, and write the checkpoint.

    Args:
        config: The settings.
        probe: Of the training list.
        videos: The training list.
        test: The test list, if there is one.
        labels: Classes, in logit order.
        measured: Metrics that are known already.

    Raises:
        FolderError: if the run folder holds the state of a training by steps.
    """
    if saved_states(Path(config.out)):
        raise FolderError(f"{config.out} holds the state of another run", hint="give another out=")
    keep_settings(config)
    targets = VideoList(videos.source, probe.items).targets(labels)
    linear = fit(probe.features, targets, num_classes=len(labels), penalty=probe.penalty)
    measured = {"penalty": probe.penalty} | measured
    if probe.held_out.total:
        measured |= {"held_out_accuracy": probe.held_out.value, "held_out_videos": probe.held_out.total}
    report = None
    if test is not None:
        report = _measure(config, linear, probe.backbone, test, labels)
        say_measured(report)
        measured |= report.metrics()
    model = probe.model
    assert model.classifier is not None
    model.classifier.linear.weight.copy_(torch.from_numpy(linear.weight))
    model.classifier.linear.bias.copy_(torch.from_numpy(linear.bias))
    before = probe.before.training
    written = write_checkpoint(
        config,
        model=model,
        videos=videos,
        golden=_golden(config, probe.items),
        labels=labels,
        training=TrainingState(
            backbone_step=before.backbone_step,
            head_steps=before.head_steps | {"classifier": before.backbone_step},
        ),
        metrics=measured,
        origin=probe.before.provenance.origin,
    )
    held = [("accuracy on held-out training videos", str(probe.held_out))] if probe.held_out.total else []
    facts = [("training videos with features", str(len(probe.items))), *held]
    write_run_page(config, videos, state="linear probe, ended", test=test, report=report, facts=facts)
    return written


def _measure(
    config: FinetuneConfig,
    linear: Linear,
    backbone: FrozenNetwork,
    test: VideoList,
    labels: tuple[str, ...],
) -> EvaluationReport:
    """Measure on the test list; a video that cannot be used counts as wrong."""
    say_left_out(test.left_out)
    units, said = units_of(test.items)
    made = _features(config, test, backbone)
    clips = config.view_plan.max_views
    answers = [
        answer(item, unit, target, one if isinstance(one, IvdrError) else linear.logits(one), clips=clips)
        for item, unit, target, one in zip(test.items, units, test.targets(labels), made, strict=True)
    ]
    return report_on(
        answers,
        labels,
        model="the linear probe in training",
        data=str(test.source),
        contract_hash=config.clip.contract_hash,
        plan=config.view_plan,
        units=said,
        left_out=test.left_out,
    )


def _features(
    config: FinetuneConfig, videos: VideoList, backbone: FrozenNetwork
) -> list[np.ndarray | IvdrError]:
    return video_outputs(
        videos,
        backbone,
        config.cache_dir,
        decode=decode_options(config),
        limits=VideoLimits.allowing(config.data.allow_containers),
    )


def _frozen(config: FinetuneConfig, path: Path, model: VideoModel, before: CheckpointInfo) -> FrozenNetwork:
    """Describe the backbone; ONNX Runtime runs it where a bundle has it so, in fp32 for this contract, else torch."""
    fast = None
    if path.is_dir():
        bundle = open_bundle(path)
        fitting = [
            variant.id
            for variant in bundle.manifest.variants
            if variant.runtime == "onnxruntime" and variant.precision == "fp32" and variant.verified
            if bundle.manifest.clip == config.clip and not misfit(variant, config.device)
        ]
        fast = fitting[0] if fitting else None
    info = replace(before, clip=config.clip, view_plan=config.view_plan)
    return FrozenNetwork(
        weights_sha256=sha256_file(checkpoint_of(path)),
        clip=config.clip,
        view_plan=config.view_plan,
        open=lambda: (
            open_model(path, variant=fast, device=config.device)
            if fast
            else open_in_memory(model, info, device=config.device)
        ),
    )


def _golden(config: FinetuneConfig, items: Sequence[VideoItem]) -> np.ndarray:
    """Decode the golden clips: the middle of some videos."""
    limits = VideoLimits.allowing(config.data.allow_containers)
    with DecodePool(decode_options(config)) as pool:
        jobs = [
            pool.submit(
                load_clips, PathSource(items[row].path), config.clip, ViewPlan(num_clips=1), limits=limits
            )
            for row in golden_rows(items)
        ]
        return np.concatenate([job.result().video for job in jobs])
