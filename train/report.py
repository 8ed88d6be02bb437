"""What a model got right on a labelled list: the report that every way of measuring gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ivdr_deploy._console import print_text
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.evaluation.bootstrap import Estimate
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import ViewPlan
from train.answers import VideoAnswer, accuracies, by_class, clip_estimate, video_estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """What a model got right."""

    model: str
    data: str
    contract_hash: str
    view_plan: ViewPlan
    """Clips of each video; accuracy depends on it."""

    labels: tuple[str, ...]
    """Classes, in logit order."""

    answers: tuple[VideoAnswer, ...]
    """Of every video, in the order of the list. One that could not be used counts as wrong, with as many clips as the
    plan may take."""

    units: str
    """What the intervals are drawn over, and how that is known, for people."""

    video_accuracy: Accuracy
    """Videos whose mean probability is highest for the true class."""

    video_accuracy_top5: Accuracy
    clip_accuracy: Accuracy
    """Single clips that are right on their own."""

    video_estimate: Estimate
    """Video accuracy with the interval over units."""

    clip_estimate: Estimate
    left_out: tuple[LeftOut, ...] = ()
    """What the listing passed over."""

    @property
    def per_class(self) -> dict[str, Accuracy]:
        """Video accuracy of every class."""
        return by_class(self.answers, self.labels)

    @property
    def failed(self) -> tuple[tuple[str, str], ...]:
        """Videos that could not be used, with the reason."""
        return tuple((one.item.uri, one.error) for one in self.answers if one.probabilities is None)

    def metrics(self) -> dict[str, float]:
        """Return the figures that a checkpoint records."""
        return {
            "video_accuracy": self.video_accuracy.value,
            "video_accuracy_low": self.video_estimate.low,
            "video_accuracy_high": self.video_estimate.high,
            "clip_accuracy": self.clip_accuracy.value,
            "test_videos": self.video_accuracy.total,
            "test_videos_failed": len(self.failed),
        }

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
            "intervals": {
                "over": self.units,
                "video_accuracy": self.video_estimate.to_dict(),
                "clip_accuracy": self.clip_estimate.to_dict(),
            },
            "per_class": {label: accuracy.to_dict() for label, accuracy in self.per_class.items()},
            "failed": [{"uri": uri, "reason": reason} for uri, reason in self.failed],
            "left_out": [asdict(entry) for entry in self.left_out],
        }


def report_on(
    answers: Sequence[VideoAnswer],
    labels: tuple[str, ...],
    *,
    model: str,
    data: str,
    contract_hash: str,
    plan: ViewPlan,
    units: str,
    left_out: tuple[LeftOut, ...] = (),
) -> EvaluationReport:
    """Sum up the answers to all videos of a list.

    Args:
        answers: Of every video.
        labels: Classes, in logit order.
        model: Its name, for people.
        data: The list.
        contract_hash: Of the contract.
        plan: Clips of each video.
        units: How it is known which videos belong together.
        left_out: What the listing passed over.
    """
    video, video_top5, clip = accuracies(answers)
    return EvaluationReport(
        model=model,
        data=data,
        contract_hash=contract_hash,
        view_plan=plan,
        labels=labels,
        answers=tuple(answers),
        units=units,
        video_accuracy=video,
        video_accuracy_top5=video_top5,
        clip_accuracy=clip,
        video_estimate=video_estimate(answers),
        clip_estimate=clip_estimate(answers),
        left_out=left_out,
    )


def say_failed(
    failed: Iterable[tuple[str, str]], *, what: str = "failed", style: Literal["red", "yellow"] = "red"
) -> None:
    """Tell a person which videos could not be used and why, a line each, whatever is in their names."""
    for uri, reason in failed:
        print_text(f"{what} {uri}: {reason}", style=style)


def say_measured(report: EvaluationReport) -> None:
    """Tell a person what a model got right on the test list, and which videos could not be used."""
    say_failed(report.failed, what="test video failed, counted as wrong:", style="yellow")
    video = report.video_accuracy
    print_text(
        f"test list: video accuracy {report.video_estimate} ({video.correct}/{video.total}), "
        f"over {report.video_estimate.units} units ({report.units})",
    )
