"""The linear probe: a classifier on kept features of a frozen backbone.

Features are brought to mean 0 and variance 1, as by a batch norm, and a softmax regression with a penalty on its
weights is fitted to its optimum; the scaling is then folded into the linear layer. The penalty is the one under which
held-out groups of the training list are most probable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ivdr_deploy._console import console, say_left_out
from ivdr_deploy._files import sha256_file
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.errors import FolderError, IvdrError
from ivdr_deploy.evaluation.metrics import Accuracy, clip_accuracy, video_accuracy
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.registry import misfit
from ivdr_deploy.spec import CheckpointInfo, TrainingState, ViewPlan
from ivdr_deploy.video import PathSource, VideoLimits
from ivdr_deploy.video.clips import load_clips
from train.cache import usable
from train.config import FinetuneConfig
from train.data import golden_rows
from train.evaluate import open_in_memory
from train.features import FrozenBackbone, video_features
from train.init import checkpoint_of, transfer
from train.run import decode_options, keep_settings, write_checkpoint
from train.state import STATE_NAME

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_PENALTY = 1e-2
"""Where nothing can be held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A classifier of features."""

    weight: np.ndarray
    """float64 (K, F)."""

    bias: np.ndarray
    """float64 (K,)."""

    def logits(self, feature: np.ndarray) -> np.ndarray:
        """Map (clips, F) to (clips, K)."""
        logits: np.ndarray = feature @ self.weight.T + self.bias
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A frozen backbone, and what it sees in the training videos."""

    model: VideoModel
    before: CheckpointInfo
    """Of the checkpoint that the backbone is from."""

    backbone: FrozenBackbone
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
    for item, error in skipped:
        console.print(f"skipped {item.uri}: {error}", style="yellow", markup=False)
    penalty, held_out = _choose_penalty(made, videos.targets(labels), parts, num_classes=len(labels))
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
    if (Path(config.out) / STATE_NAME).exists():
        raise FolderError(f"{config.out} holds the state of another run", hint="give another out=")
    keep_settings(config)
    targets = VideoList(videos.source, probe.items).targets(labels)
    linear = fit(probe.features, targets, num_classes=len(labels), penalty=probe.penalty)
    measured = {"penalty": probe.penalty} | measured
    if test is not None:
        measured |= _measure(config, linear, probe.backbone, test, labels)
    model = probe.model
    assert model.classifier is not None
    model.classifier.linear.weight.copy_(torch.from_numpy(linear.weight))
    model.classifier.linear.bias.copy_(torch.from_numpy(linear.bias))
    before = probe.before.training
    return write_checkpoint(
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


def fit(
    features: Sequence[np.ndarray], targets: Sequence[int], *, num_classes: int, penalty: float
) -> Linear:
    """Fit a softmax regression; every video counts alike, however many clips it has.

    The loss is the mean cross-entropy and ``penalty / 2`` times the sum of the squared weights of scaled features.

    Args:
        features: Per video (clips, F).
        targets: Class of every video.
        num_classes: K.
        penalty: Above 0, so that there is one optimum.
    """
    stacked = np.concatenate(features).astype(np.float64)
    mean, variance = stacked.mean(axis=0), stacked.var(axis=0)
    # A feature that hardly ever varies would be scaled up to noise.
    scale = np.sqrt(variance + 1e-4 * variance.mean() + 1e-30)
    # The best weights lie in the span of the inputs, which on few videos has far fewer dimensions than F.
    with _one_thread():
        inputs, basis = _in_span((stacked - mean) / scale)
    counts = np.array([len(feature) for feature in features])
    truth = torch.from_numpy(np.repeat(np.asarray(targets), counts))
    share = torch.from_numpy(np.repeat(1.0 / counts, counts) / len(features))
    weight = torch.zeros(num_classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, truth, reduction="none")
        total = (share * losses).sum() + 0.5 * penalty * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with _one_thread():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    scaled = (weight.detach() @ basis).numpy() / scale
    return Linear(weight=scaled, bias=bias.detach().numpy() - scaled @ mean)


def _in_span(inputs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coordinates (N, R) of inputs (N, F) and the orthonormal basis (R, F) that they are in."""
    given = torch.from_numpy(inputs)
    if len(given) >= given.shape[1]:
        return given, torch.eye(given.shape[1], dtype=given.dtype)
    basis = torch.linalg.qr(given.T).Q.T
    return given @ basis.T, basis


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: sharing out operators as small as these costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _choose_penalty(
    made: Sequence[np.ndarray | IvdrError],
    targets: Sequence[int],
    parts: Sequence[np.ndarray],
    *,
    num_classes: int,
) -> tuple[float, Accuracy]:
    """Return the penalty under which the held-out videos are most probable, and the accuracy on them."""
    if not parts:
        return _PENALTY, Accuracy(0, 0)
    good = {row: one for row, one in enumerate(made) if not isinstance(one, IvdrError)}
    best: tuple[float, float, Accuracy] | None = None
    for penalty in PENALTIES:
        probabilities, truth, failed = [], [], 0
        for part in parts:
            held = set(part.tolist())
            rows = [row for row in good if row not in held]
            linear = fit(
                [good[row] for row in rows],
                [targets[row] for row in rows],
                num_classes=num_classes,
                penalty=penalty,
            )
            shown = sorted(held & good.keys())
            probabilities += [softmax(linear.logits(good[row])).mean(axis=0) for row in shown]
            truth += [targets[row] for row in shown]
            failed += len(held) - len(shown)
        loss = -float(
            np.mean([np.log(row[target]) for row, target in zip(probabilities, truth, strict=True)])
        )
        if best is None or loss < best[0]:
            best = loss, penalty, video_accuracy(probabilities, truth).with_wrong(failed)
    assert best is not None
    return best[1:]


def _measure(
    config: FinetuneConfig,
    linear: Linear,
    backbone: FrozenBackbone,
    test: VideoList,
    labels: tuple[str, ...],
) -> dict[str, float]:
    """Return the accuracy on the test list; a video that cannot be used is named, and counts as wrong."""
    logits, truth, missed = [], [], 0
    for item, target, made in zip(
        test.items, test.targets(labels), _features(config, test, backbone), strict=True
    ):
        if isinstance(made, IvdrError):
            console.print(
                f"test video failed, counted as wrong: {item.uri}: {made}", style="yellow", markup=False
            )
            missed += 1
            continue
        logits.append(linear.logits(made))
        truth.append(target)
    videos = video_accuracy([softmax(one).mean(axis=0) for one in logits], truth).with_wrong(missed)
    console.print(f"test list: video accuracy {videos}", markup=False)
    return {
        "video_accuracy": videos.value,
        "clip_accuracy": clip_accuracy(logits, truth).with_wrong(missed * config.view_plan.max_views).value,
        "test_videos": videos.total,
        "test_videos_failed": missed,
    }


def _features(
    config: FinetuneConfig, videos: VideoList, backbone: FrozenBackbone
) -> list[np.ndarray | IvdrError]:
    return video_features(
        videos,
        backbone,
        config.cache_dir,
        decode=decode_options(config),
        limits=VideoLimits.allowing(config.data.allow_containers),
    )


def _frozen(config: FinetuneConfig, path: Path, model: VideoModel, before: CheckpointInfo) -> FrozenBackbone:
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
    return FrozenBackbone(
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
