"""What a model said about each video of a labelled list, and what follows: accuracy, intervals, confusion, rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import as_text
from ivdr_deploy.datasets.lists import VideoItem
from ivdr_deploy.errors import IvdrError
from ivdr_deploy.evaluation.bootstrap import Estimate, share_estimate
from ivdr_deploy.evaluation.metrics import Accuracy, per_class_accuracy, video_accuracy
from ivdr_deploy.results import softmax
from train.groups import group_videos

_TOP = 5
"""Answers of a video that a row names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoAnswer:
    """One video of the list."""

    item: VideoItem
    unit: str
    """What it shares with others of the list, see ``units_of``."""

    target: int
    """The true class."""

    probabilities: np.ndarray | None
    """(K,) mean over its clips; None where the video could not be used."""

    clips: int
    """Clips that were looked at; of a video that could not be used, those that the plan may take."""

    clips_right: int
    """Of them, those that are right on their own."""

    error: str = ""
    """Why it could not be used."""

    @property
    def predicted(self) -> int:
        """The most probable class, of equals the first; -1 for none."""
        return -1 if self.probabilities is None else int(self.probabilities.argmax())

    @property
    def right(self) -> bool:
        """Whether that is the true class."""
        return self.predicted == self.target

    @property
    def of_truth(self) -> float:
        """Probability of the true class; 0 where there is no answer."""
        return 0.0 if self.probabilities is None else float(self.probabilities[self.target])

    def top(self, labels: Sequence[str], count: int = _TOP) -> list[tuple[str, float]]:
        """Return the most probable classes, best first."""
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(labels[place], float(self.probabilities[place])) for place in order]


def answer(
    item: VideoItem, unit: str, target: int, given: np.ndarray | IvdrError, *, clips: int
) -> VideoAnswer:
    """Sum up the logits (clips, K) of a video, or say why there are none.

    Args:
        item: The video.
        unit: See ``VideoAnswer``.
        target: The true class.
        given: The logits of every clip, or the reason.
        clips: Clips that the plan may take.
    """
    if isinstance(given, IvdrError):
        return VideoAnswer(
            item=item,
            unit=unit,
            target=target,
            probabilities=None,
            clips=clips,
            clips_right=0,
            error=str(given),
        )
    return VideoAnswer(
        item=item,
        unit=unit,
        target=target,
        probabilities=softmax(given).mean(axis=0),
        clips=len(given),
        clips_right=int((given.argmax(axis=-1) == target).sum()),
    )


def units_of(items: Sequence[VideoItem]) -> tuple[list[str], str]:
    """Say what each labelled video shares with others, and how that is known; see ``group_videos``.

    Where a list gives a group for some videos only, the others are by themselves.
    """
    if any(item.group for item in items):
        return [item.group or item.uri for item in items], "column group of the list"
    return group_videos(items)


def accuracies(answers: Sequence[VideoAnswer]) -> tuple[Accuracy, Accuracy, Accuracy]:
    """Return video accuracy, that among the first five, and clip accuracy. No answer is a wrong one."""
    given = [one for one in answers if one.probabilities is not None]
    missed = len(answers) - len(given)
    rows = [one.probabilities for one in given if one.probabilities is not None]
    truth = [one.target for one in given]
    top1, top5 = (video_accuracy(rows, truth, k=k).with_wrong(missed) for k in (1, 5))
    clips = Accuracy(sum(one.clips_right for one in answers), sum(one.clips for one in answers))
    return top1, top5, clips


def video_estimate(answers: Sequence[VideoAnswer]) -> Estimate:
    """Estimate the video accuracy, over the units."""
    return share_estimate(
        [int(one.right) for one in answers], [1] * len(answers), [one.unit for one in answers]
    )


def clip_estimate(answers: Sequence[VideoAnswer]) -> Estimate:
    """Estimate the clip accuracy, over the units: the clips of a video are no independent questions."""
    return share_estimate(
        [one.clips_right for one in answers],
        [one.clips for one in answers],
        [one.unit for one in answers],
    )


def by_class(answers: Sequence[VideoAnswer], labels: Sequence[str]) -> dict[str, Accuracy]:
    """Return the video accuracy of every class."""
    found = per_class_accuracy(
        [one.predicted for one in answers], [one.target for one in answers], num_classes=len(labels)
    )
    return dict(zip(labels, found, strict=True))


def confusion(answers: Sequence[VideoAnswer], *, num_classes: int) -> np.ndarray:
    """Count the answers: int64 (K, K + 1), true class by predicted class; the last column counts those without one."""
    out = np.zeros((num_classes, num_classes + 1), np.int64)
    for one in answers:
        out[one.target, one.predicted] += 1  # -1 is the last column
    return out


def rows(answers: Sequence[VideoAnswer], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return one object per video, in the order of the list."""
    return [
        {
            "uri": as_text(one.item.uri),
            "group": as_text(one.unit),
            "label": labels[one.target],
            "predicted": labels[one.predicted] if one.predicted >= 0 else None,
            "right": one.right,
            "probability_of_label": one.of_truth,
            "clips": one.clips,
            "clips_right": one.clips_right,
            "top": [{"label": label, "probability": value} for label, value in one.top(labels)],
            "error": as_text(one.error) or None,
        }
        for one in answers
    ]


def write_rows(path: Path, answers: Sequence[VideoAnswer], labels: Sequence[str]) -> None:
    """Write the rows as JSON lines or, where the name ends in ``.csv``, as a table.

    Raises:
        OSError: if the file cannot be written; an older one stays.
    """
    found = rows(answers, labels)
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="" if path.suffix == ".csv" else "\n") as stream,
    ):
        if path.suffix != ".csv":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            return
        table = csv.writer(stream)
        names = [name for name in found[0] if name != "top"] if found else []
        table.writerow([*names, *(f"top{place + 1}" for place in range(_TOP))])
        for row in found:
            top = [f"{entry['label']} {entry['probability']:.4f}" for entry in row["top"]]
            cells = [row[name] for name in names] + top + [""] * (_TOP - len(top))
            table.writerow(["" if cell is None else cell for cell in cells])
