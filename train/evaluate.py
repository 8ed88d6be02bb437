"""Accuracy of a model on a labelled list, through the same path as prediction, scoring and serving."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ivdr_deploy._console import progress, say_left_out
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import CheckpointError, IvdrError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.torch_runtime import TorchRuntime
from ivdr_deploy.spec import CheckpointInfo, Device, ViewPlan
from ivdr_deploy.video.reader import VideoLimits
from train.answers import answer, units_of
from train.features import FrozenNetwork, forget, video_outputs
from train.page import write_evaluation
from train.report import EvaluationReport, report_on

ANSWERS = "answers"
"""Folder of what is known so far, while a list is measured."""

PROTOCOLS = {"ten-clip": ViewPlan(num_clips=10)}
"""View plans that papers name."""


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    root: str | Path | None = None,
    plan: ViewPlan | None = None,
    limits: VideoLimits | None = None,
    device: Device = "cpu",
    out: str | Path | None = None,
    kept: Path | None = None,
) -> EvaluationReport:
    """Run the model on some clips of every video; the highest mean probability wins.

    Args:
        checkpoint: A checkpoint, or anything else ``open_model`` opens.
        data: A labelled list; of one that holds a training part too, the test part.
        root: Where relative paths in it start; None: at its folder.
        plan: Which clips; the plan that the checkpoint records when None.
        limits: What a video may cost.
        device: Where to run.
        out: Folder for the page, the report and what was said about each video; None: nothing is written. Until they
            are there it keeps the answers so far, and the same measurement goes on from them.
        kept: Another folder for the answers so far; who gives it forgets them.

    Raises:
        DataError: if the list is unusable, or has a class that the model does not know.
        CheckpointError: if the model has no trained classifier.
        OSError: if ``out`` cannot be written.
    """
    model = open_model(checkpoint, device=device)
    with model.runtime:
        videos = read_video_list(data, root=root, part="test")
        answers = Path(out) / ANSWERS if out is not None and kept is None else kept
        report = evaluate_model(model, videos, plan=plan, limits=limits, kept=answers)
        if out is not None:
            write_evaluation(Path(out), report, videos, model, limits=limits or VideoLimits())
        if answers is not None and kept is None:
            forget(answers)  # who measures again wants to see it measured
        return report


def evaluate_model(
    model: LoadedModel,
    videos: VideoList,
    *,
    plan: ViewPlan | None = None,
    limits: VideoLimits | None = None,
    decode: DecodeOptions | None = None,
    kept: Path | None = None,
) -> EvaluationReport:
    """Measure the accuracy of an open model.

    Args:
        model: With the output ``logits``.
        videos: Labelled.
        plan: Which clips of each video; the model's own plan when None.
        limits: What a video may cost.
        decode: The decode workers.
        kept: Folder where the answer to each video is written as soon as it is there, and read where it is there
            already; None: they are held.

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
    limits, decode = limits or VideoLimits(), decode or DecodeOptions()
    given: Iterable[np.ndarray | IvdrError]
    if kept is None:
        given = _answers(model, videos, plan, limits, decode)
    else:
        network = FrozenNetwork(
            weights_sha256=f"{model.sha256} {model.variant}",
            clip=model.clip,
            view_plan=plan,
            open=lambda: model,
            output="logits",
        )
        given = video_outputs(videos, network, kept, decode=decode, limits=limits)
    units, said = units_of(videos.items)
    answers = [
        answer(*one, clips=plan.max_views) for one in zip(videos.items, units, targets, given, strict=True)
    ]
    return report_on(
        answers,
        model.labels,
        model=str(model.path),
        data=str(videos.source),
        contract_hash=model.contract_hash,
        plan=plan,
        units=said,
        left_out=videos.left_out,
    )


def _answers(
    model: LoadedModel, videos: VideoList, plan: ViewPlan, limits: VideoLimits, decode: DecodeOptions
) -> Iterator[np.ndarray | IvdrError]:
    """Yield the logits (clips, K) of every video, or why there are none."""
    with VideoPredictor(model, limits=limits, decode=decode) as predictor:
        outcomes = predictor.predict_many([item.path for item in videos.items], plan=plan)
        for outcome in progress(outcomes, total=len(videos.items), description="evaluating"):
            if outcome.raw is not None:
                yield outcome.raw.outputs["logits"]
            else:
                assert outcome.error is not None
                yield outcome.error


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
