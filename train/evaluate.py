"""Accuracy of a model on a labelled list, through the same path as prediction, scoring and serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivdr_deploy._console import progress, say_left_out
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.evaluation.metrics import Accuracy, clip_accuracy, per_class_accuracy, video_accuracy
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.torch_runtime import TorchRuntime
from ivdr_deploy.spec import CheckpointInfo, Device, ViewPlan
from ivdr_deploy.video.reader import VideoLimits

PROTOCOLS = {"ten-clip": ViewPlan(num_clips=10)}
"""View plans that papers name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """What a model got right."""

    model: str
    data: str
    contract_hash: str
    view_plan: ViewPlan
    """Clips of each video; accuracy depends on it."""

    video_accuracy: Accuracy
    """Videos whose mean probability is highest for the true class."""

    video_accuracy_top5: Accuracy
    clip_accuracy: Accuracy
    """Single clips that are right on their own."""

    per_class: dict[str, Accuracy]
    """Video accuracy of every class."""

    failed: tuple[tuple[str, str], ...]
    """Videos that could not be used, with the reason. They count as wrong, with as many clips as the plan may take."""

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "model": self.model,
            "data": self.data,
            "contract_hash": self.contract_hash,
            "view_plan": to_dict(self.view_plan),
            "video_accuracy": self.video_accuracy.to_dict(),
            "video_accuracy_top5": self.video_accuracy_top5.to_dict(),
            "clip_accuracy": self.clip_accuracy.to_dict(),
            "per_class": {label: accuracy.to_dict() for label, accuracy in self.per_class.items()},
            "failed": [{"uri": uri, "reason": reason} for uri, reason in self.failed],
        }


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    root: str | Path | None = None,
    plan: ViewPlan | None = None,
    limits: VideoLimits | None = None,
    device: Device = "cpu",
) -> EvaluationReport:
    """Run the model on some clips of every video; the highest mean probability wins.

    Args:
        checkpoint: A checkpoint, or anything else ``open_model`` opens.
        data: A labelled list; of one that holds a training part too, the test part.
        root: Where relative paths in it start; None: at its folder.
        plan: Which clips; the plan that the checkpoint records when None.
        limits: What a video may cost.
        device: Where to run.

    Raises:
        DataError: if the list is unusable, or has a class that the model does not know.
        CheckpointError: if the model has no trained classifier.
    """
    model = open_model(checkpoint, device=device)
    with model.runtime:
        return evaluate_model(model, read_video_list(data, root=root, part="test"), plan=plan, limits=limits)


def evaluate_model(
    model: LoadedModel,
    videos: VideoList,
    *,
    plan: ViewPlan | None = None,
    limits: VideoLimits | None = None,
    decode: DecodeOptions | None = None,
) -> EvaluationReport:
    """Measure the accuracy of an open model.

    Args:
        model: With the output ``logits``.
        videos: Labelled.
        plan: Which clips of each video; the model's own plan when None.
        limits: What a video may cost.
        decode: The decode workers.

    Raises:
        DataError: if labels or files are missing, or a class is unknown.
        CheckpointError: if the model has no trained classifier.
    """
    if "logits" not in model.output_names:
        raise CheckpointError(
            f"{model.path} has no classifier that fits its backbone",
            hint="`python -m train finetune` trains one",
        )
    say_left_out(videos.left_out)
    targets = videos.targets(model.labels)
    videos.require_files()
    plan = plan or model.view_plan
    probabilities, logits, truth, missed, failed = [], [], [], [], []
    with VideoPredictor(model, limits=limits, decode=decode) as predictor:
        outcomes = predictor.predict_many([item.path for item in videos.items], plan=plan)
        watched = progress(outcomes, total=len(videos.items), description="evaluating")
        for item, target, outcome in zip(videos.items, targets, watched, strict=True):
            if outcome.result is None:
                failed.append((item.uri, str(outcome.error)))
                missed.append(target)
                continue
            assert outcome.result.probabilities is not None
            assert outcome.result.clip_logits is not None
            probabilities.append(outcome.result.probabilities)
            logits.append(outcome.result.clip_logits)
            truth.append(target)
    predicted = [int(row.argmax()) for row in probabilities] + [-1] * len(missed)  # the class of none
    by_class = per_class_accuracy(predicted, truth + missed, num_classes=len(model.labels))
    return EvaluationReport(
        model=str(model.path),
        data=str(videos.source),
        contract_hash=model.contract_hash,
        view_plan=plan,
        video_accuracy=video_accuracy(probabilities, truth).with_wrong(len(missed)),
        video_accuracy_top5=video_accuracy(probabilities, truth, k=5).with_wrong(len(missed)),
        clip_accuracy=clip_accuracy(logits, truth).with_wrong(len(missed) * plan.max_views),
        per_class=dict(zip(model.labels, by_class, strict=True)),
        failed=tuple(failed),
    )


def open_in_memory(model: VideoModel, info: CheckpointInfo, *, device: Device) -> LoadedModel:
    """Wrap a network that was just trained, to measure it as it will be used; puts it in eval mode."""
    names = info.training.valid_outputs()
    return LoadedModel(
        path=Path("the model in training"),
        name="training",
        version="0",
        clip=info.clip,
        view_plan=info.view_plan,
        labels=info.labels,
        output_names=names,
        runtime=TorchRuntime(model, clip=info.clip, output_names=names, device=device),
        variant="torch-fp32",
        reason="it was just trained",
        sha256="",
        manifest=to_dict(info),
        golden_max_abs_diff={},
        decode_mean_diff={},
    )
