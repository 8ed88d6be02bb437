"""One page per run or evaluation: a file of HTML that needs nothing else, made from what is known so far."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import as_text
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import IvdrError
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ClipSpec
from ivdr_deploy.video import VideoLimits
from train.answers import VideoAnswer, write_rows
from train.charts import curve, escaped
from train.page_report import figures, report_sections
from train.pictures import clip_strips
from train.report import EvaluationReport

PAGE_NAME = "page.html"

_TEMPLATE = Path(__file__).with_name("page.html")
_WORST = 12
"""Videos that are shown with frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What a page shows. A part that is empty is left out."""

    title: str
    subtitle: str = ""
    alarms: Sequence[str] = ()
    tiles: Sequence[tuple[str, str, str]] = ()
    """Name, figure and what it means."""

    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None
    """Values of every metric, (step, value)."""

    marks: Mapping[str, Sequence[tuple[float, float]]] | None = None
    """Single values to draw as dots; of a name in ``curves``, into its picture."""

    report: EvaluationReport | None = None
    worst: Sequence[tuple[VideoAnswer, list[str] | IvdrError]] = ()
    """See ``worst_answers``."""

    facts: Sequence[tuple[str, str]] = ()
    """Of the data."""

    classes: Mapping[str, Mapping[str, int]] | None = None
    """Videos of every class, by list."""

    settings: Mapping[str, Any] | None = None


def write_page(path: Path, page: Page) -> Path:
    """Write a page; an older one is replaced as a whole.

    Raises:
        OSError: if the file cannot be written; the older one stays.
    """
    sections = [_curves(page), *report_sections(page.report, page.worst), _data(page), _settings(page)]
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escaped(page.title),
        subtitle=escaped(page.subtitle),
        alarms="".join(f'<p class="alarm" role="alert">{escaped(alarm)}</p>' for alarm in page.alarms),
        tiles=_tiles([*page.tiles, *(figures(page.report) if page.report else [])]),
        sections="\n".join(section for section in sections if section),
        footer=f"Written {datetime.now(UTC).isoformat(timespec='seconds')} by ivdr_deploy.",
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_evaluation(
    folder: Path, report: EvaluationReport, videos: VideoList, model: LoadedModel, *, limits: VideoLimits
) -> Path:
    """Write page, report and rows of an evaluation; the page last.

    Args:
        folder: Made when absent.
        report: What was measured.
        videos: The list it was measured on.
        model: What was measured.
        limits: What a video may cost.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".jsonl"):
        write_rows(folder / f"videos{suffix}", report.answers, report.labels)
    write_report(folder, report.to_dict())
    alarms = [f"{len(report.failed)} videos could not be used and count as wrong; see below."]
    page = Page(
        title=f"{model.name} on {videos.source}",
        subtitle=f"{model.path}, variant {model.variant}, contract {model.contract_hash[:12]}",
        alarms=alarms if report.failed else [],
        report=report,
        worst=worst_answers(report, model.clip, limits=limits),
        facts=list_facts("test", videos),
        classes={"test": class_counts(videos)},
        settings={"clip": to_dict(model.clip), "view_plan": to_dict(report.view_plan)},
    )
    return write_page(folder / PAGE_NAME, page)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``report.json``, over an older one.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the columns of a table whose first one is the step; none where there is no file.

    A row that is only half written, as by a run that was killed, ends the reading.
    """
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        header, *lines = list(csv.reader(stream)) or [[]]
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in header[1:]}
    for line in lines:
        try:
            step, *values = (float(cell) for cell in line)
        except ValueError:
            break
        if len(values) != len(out):
            break
        for name, value in zip(out, values, strict=True):
            out[name].append((step, value))
    return {name: points for name, points in out.items() if points}


def worst_answers(
    report: EvaluationReport, clip: ClipSpec, *, limits: VideoLimits, decode: DecodeOptions | None = None
) -> list[tuple[VideoAnswer, list[str] | IvdrError]]:
    """Return the wrong answers that gave the true class least, with the frames of the middle clip.

    Args:
        report: The answers.
        clip: The contract.
        limits: What a video may cost.
        decode: The decode workers.
    """
    wrong = [one for one in report.answers if one.probabilities is not None and not one.right]
    chosen = sorted(wrong, key=lambda one: one.of_truth)[:_WORST]
    strips = clip_strips([one.item.path for one in chosen], clip, decode=decode, limits=limits)
    return list(zip(chosen, strips, strict=True))


def list_facts(name: str, videos: VideoList) -> list[tuple[str, str]]:
    """Return what is known of a list without opening a video.

    Args:
        name: What the list is for, such as "training".
        videos: The list.
    """
    groups = {item.group for item in videos.items if item.group}
    facts = [
        (f"{name} list", str(videos.source)),
        (f"{name} videos", f"{len(videos.items)}, {len(videos.labels)} classes"),
        (f"{name} list, SHA-256", videos.data_hash[:16]),
    ]
    if groups:
        facts.append((f"{name} groups", str(len(groups))))
    facts += [(f"{name} list, left out", str(left)) for left in videos.left_out]
    return facts


def class_counts(videos: VideoList) -> dict[str, int]:
    """Count the videos of every class."""
    return dict(sorted(Counter(item.label for item in videos.items if item.label is not None).items()))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Spell nested settings with dotted names."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out


def _tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    if not tiles:
        return ""
    shown = (
        f'<div class="tile"><span class="soft">{escaped(name)}</span><b>{escaped(value)}</b>{escaped(said)}</div>'
        for name, value, said in tiles
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _curves(page: Page) -> str:
    curves, marks = dict(page.curves or {}), dict(page.marks or {})
    pictures = [curve(name, points, marks=marks.pop(name, ())) for name, points in curves.items()]
    pictures += [curve(name, points, marks=points) for name, points in marks.items() if points]
    if not pictures:
        return ""
    note = "Orange dots are validations." if page.marks else "One point a line of the log."
    body = f'<div class="curves">{"".join(pictures)}</div>'
    return f'<section><h2>Losses and metrics</h2>{body}<p class="soft">{note}</p></section>'


def _data(page: Page) -> str:
    if not page.facts:
        return ""
    lines = "".join(
        f"<tr><th>{escaped(name)}</th><td>{escaped(value)}</td></tr>" for name, value in page.facts
    )
    counted = ""
    if page.classes:
        lists = list(page.classes)
        names = sorted({label for counts in page.classes.values() for label in counts})
        head = "".join(f"<th>{escaped(name)}</th>" for name in lists)
        rows = "".join(
            f"<tr><td>{escaped(label)}</td>"
            + "".join(f"<td>{page.classes[name].get(label, 0)}</td>" for name in lists)
            + "</tr>"
            for label in names
        )
        counted = (
            f"<details><summary>Videos by class ({len(names)})</summary>"
            f'<div class="scroll"><table><thead><tr><th>class</th>{head}</tr></thead>{rows}</table></div></details>'
        )
    return f'<section><h2>Data</h2><table class="facts">{lines}</table>{counted}</section>'


def _settings(page: Page) -> str:
    if not page.settings:
        return ""
    lines = "".join(
        f"<tr><th>{escaped(name)}</th><td>{escaped(_spelled(value))}</td></tr>"
        for name, value in flat(page.settings).items()
    )
    return (
        f"<section><h2>Settings</h2><details><summary>All {len(flat(page.settings))} settings</summary>"
        f'<table class="facts">{lines}</table></details></section>'
    )


def _spelled(value: Any) -> str:
    return as_text(str(value))
