"""Two models on the same videos: who is better, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ivdr_deploy.errors import DataError
from ivdr_deploy.evaluation.bootstrap import Estimate, mean_estimate
from ivdr_deploy.evaluation.paired import PairedChange
from train.report import EvaluationReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The change of video accuracy from one model to another, paired by video."""

    before: str
    now: str
    change: PairedChange
    by_units: Estimate
    """The same change with a bootstrap over units, where more than one video belongs to one."""

    p_value: float
    """Of McNemar's exact test: how likely so uneven a win and loss is if both are equally good. It takes videos for
    independent questions."""

    lost: tuple[str, ...]
    """Videos that only the other model had right."""

    won: tuple[str, ...]
    """Videos that only this model has right."""

    failed_before: tuple[tuple[str, str], ...]
    """Videos that the other model gave no answer to, with the reason. They count as wrong, as in its accuracy."""

    failed_now: tuple[tuple[str, str], ...]
    """The same of this model."""

    def __str__(self) -> str:
        low, high = self.change.interval
        said = f"{100 * self.change.value:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
        if self.by_units.units > 1:
            ends = f"{100 * self.by_units.low:+.1f} to {100 * self.by_units.high:+.1f}"
            said += f" (over {self.by_units.units} units {ends})"
        said += (
            f"; won {self.change.won}, lost {self.change.lost} of {self.change.total}, p = {self.p_value:.3g}"
        )
        without = [
            f"{len(inside)} {name} since {which} model gave no answer"
            for name, which, videos, failed in (
                ("won", "the other", self.won, self.failed_before),
                ("lost", "this", self.lost, self.failed_now),
            )
            if (inside := {uri for uri, _ in failed}.intersection(videos))
        ]
        return f"{said}; of these {' and '.join(without)}" if without else said

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "before": self.before,
            "now": self.now,
            "video_accuracy": self.change.to_dict(),
            "by_units": self.by_units.to_dict(),
            "p_value": self.p_value,
            "lost": list(self.lost),
            "won": list(self.won),
            "failed_before": [{"uri": uri, "reason": reason} for uri, reason in self.failed_before],
            "failed_now": [{"uri": uri, "reason": reason} for uri, reason in self.failed_now],
        }


def compare(before: EvaluationReport, now: EvaluationReport) -> Comparison:
    """Compare the answers of two models to the same list. A video without an answer is wrong, as in their accuracies.

    Raises:
        DataError: if the reports are not on the same videos.
    """
    names = [[one.item.uri for one in report.answers] for report in (before, now)]
    truth = [[report.labels[one.target] for one in report.answers] for report in (before, now)]
    if names[0] != names[1] or truth[0] != truth[1]:
        raise DataError(f"{before.model} and {now.model} were not measured on the same videos")
    pairs = list(zip(before.answers, now.answers, strict=True))
    change = PairedChange.between([old.right for old, _ in pairs], [new.right for _, new in pairs])
    return Comparison(
        before=before.model,
        now=now.model,
        change=change,
        by_units=mean_estimate(
            [float(new.right) - float(old.right) for old, new in pairs], [new.unit for _, new in pairs]
        ),
        p_value=mcnemar(change.lost, change.won),
        lost=tuple(old.item.uri for old, new in pairs if old.right and not new.right),
        won=tuple(new.item.uri for old, new in pairs if new.right and not old.right),
        failed_before=before.failed,
        failed_now=now.failed,
    )


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p value of the exact test: lost and won are equally likely."""
    total, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))
