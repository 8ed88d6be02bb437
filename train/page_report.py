"""The part of a page that shows what a model got right and wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ivdr_deploy.errors import IvdrError
from train.answers import VideoAnswer, confusion
from train.charts import class_bars, escaped
from train.report import EvaluationReport

_TABLE_CLASSES = 30
"""Classes up to which the whole confusion matrix is shown."""

_PAIRS = 12
"""Confusions that are named."""


def figures(report: EvaluationReport) -> list[tuple[str, str, str]]:
    """Return the accuracies: name, figure, and what it means."""
    video, clip, top5 = report.video_accuracy, report.clip_accuracy, report.video_accuracy_top5

    def percent(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.1%}"

    def interval(low: float, high: float) -> str:
        return f"95 % interval {low:.1%} to {high:.1%}"

    ours, clips = report.video_estimate, report.clip_estimate
    return [
        (
            "video accuracy",
            percent(video.value),
            f"{video.correct} of {video.total}; {interval(ours.low, ours.high)}",
        ),
        (
            "clip accuracy",
            percent(clip.value),
            f"{clip.correct} of {clip.total}; {interval(clips.low, clips.high)}",
        ),
        ("among the first 5", percent(top5.value), f"of {len(report.labels)} classes"),
        ("view plan", str(report.view_plan), f"intervals over {ours.units} units: {report.units}"),
    ]


def report_sections(
    report: EvaluationReport | None, worst: Sequence[tuple[VideoAnswer, list[str] | IvdrError]]
) -> list[str]:
    """Show classes, confusions, the worst answers and the failures; nothing where there is no report.

    Args:
        report: What was measured.
        worst: Wrong answers, each with frames as data URLs, or why there are none.
    """
    if report is None:
        return []
    counts = confusion(report.answers, num_classes=len(report.labels))
    parts = [
        f"<section><h2>Accuracy by class</h2>{class_bars(report.per_class)}"
        '<p class="soft">The bar is the accuracy of videos, the line in it its 95 % interval (Wilson).</p></section>',
        f"<section><h2>Confusion</h2>{_confusions(counts, report.labels)}</section>",
    ]
    if worst:
        cards = "".join(_card(one, strip, report.labels) for one, strip in worst)
        wrong = sum(one.probabilities is not None and not one.right for one in report.answers)
        parts.append(
            f'<section><h2>The worst answers</h2><p class="soft">{len(worst)} of {wrong} wrong answers: those that '
            "gave the true class least, with the middle clip as the network sees it.</p>"
            f'<div class="clips">{cards}</div></section>'
        )
    if report.failed:
        lines = "".join(
            f"<tr><th>{escaped(uri)}</th><td>{escaped(why)}</td></tr>" for uri, why in report.failed
        )
        parts.append(
            f"<section><h2>Videos that could not be used</h2><p>They count as wrong.</p>"
            f'<table class="facts">{lines}</table></section>'
        )
    return parts


def _confusions(counts: np.ndarray, labels: Sequence[str]) -> str:
    """Show which class was taken for which: the matrix, where there are few classes, and the largest confusions."""
    names = [*labels, "no answer"]
    wrong = [
        (int(counts[row, column]), row, column)
        for row, column in zip(*np.nonzero(counts), strict=True)
        if row != column
    ]
    wrong.sort(key=lambda one: -one[0])
    lines = "".join(
        f"<tr><td>{count}</td><td>{escaped(names[row])}</td><td>taken for {escaped(names[column])}</td></tr>"
        for count, row, column in wrong[:_PAIRS]
    )
    rest = f'<p class="soft">and {len(wrong) - _PAIRS} more pairs</p>' if len(wrong) > _PAIRS else ""
    listed = (
        f"<h3>Largest confusions</h3><table>{lines}</table>{rest}" if wrong else "<p>No wrong answer.</p>"
    )
    asked = np.flatnonzero(counts.sum(axis=1)).tolist()
    if len(labels) > _TABLE_CLASSES:
        return listed
    columns = [*range(len(labels)), *([len(labels)] if counts[:, -1].any() else [])]
    head = "".join(f"<th>{escaped(names[column])}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escaped(names[row])}</th>"
        + "".join(_cell(counts[row], row, column) for column in columns)
        + "</tr>"
        for row in asked
    )
    matrix = (
        f'<div class="scroll"><table class="confusion"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
        '</table></div><p class="soft">A row is a true class, a column an answer.</p>'
    )
    return f'<div class="beside"><div>{matrix}</div><div>{listed}</div></div>'


def _cell(row: np.ndarray, true: int, column: int) -> str:
    count = int(row[column])
    kind = "r" if true == column else "w"
    return f'<td class="{kind}" style="--v:{count / row.sum():.3f}">{count or ""}</td>'


def _card(one: VideoAnswer, strip: list[str] | IvdrError, labels: Sequence[str]) -> str:
    if isinstance(strip, IvdrError):
        shown = f"<p>no frames: {escaped(str(strip))}</p>"
    else:
        images = "".join(f'<img src="{url}" alt="" width="112" height="112">' for url in strip)
        shown = f'<div class="strip">{images}</div>'
    said = ", ".join(f"{label} {value:.0%}" for label, value in one.top(labels, 3))
    return (
        f'<div class="card">{shown}<p>{escaped(one.item.uri)}</p>'
        f"<p>is <b>{escaped(labels[one.target])}</b> ({one.of_truth:.1%})</p>"
        f'<p class="bad">answered {escaped(said)}</p></div>'
    )
