"""The report of a score table as one page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ivdr_deploy._text import cut, one_line
from ivdr_deploy.scoring.drift import SAMPLE, Drift
from ivdr_deploy.scoring.report import BINS, Report

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0; }
th { white-space: nowrap; } td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; overflow-wrap: normal; width: 4rem; }
td.bar { width: 50%; vertical-align: middle; } td.bar div { background: #4a86c0; height: .8rem; }
"""

SHOWN = 500
"""Characters of a name or a reason that a person is shown: a list may hold a name of any length."""

_NUMBER = ' class="number"'


def page(report: Report) -> str:
    """Return the page as HTML. Whatever is in names and messages is shown as text."""
    parts = [
        f"<h1>Scores of {_text(report.run['model'])}</h1>",
        _facts({"table": report.folder, "rows": report.rows, "state": report.state, **report.run}),
        f"<p>time: {time_line(report.seconds)}</p>",
        "<h2>Outcomes</h2>",
        _bars(report.outcomes),
        "<h2>Labels</h2>",
        _bars(report.labels),
        "<h2>Confidence</h2>",
        _bars(
            {
                f"{place / BINS:.1f}\u2013{(place + 1) / BINS:.1f}": n
                for place, n in enumerate(report.confidence["bins"])
            }
        ),
    ]
    if report.accuracy is not None:
        parts.append(f"<p>{accuracy_line(report.accuracy)}</p>")
    if report.drift is not None:
        drift = report.drift
        parts += [
            "<h2>Drift</h2>",
            _facts({"against": f"{drift.reference}, {drift.reference_state}", **drift_lines(drift)}),
        ]
    parts += ["<h2>Slowest</h2>", _rows({"uri": "video", "num_frames": "frames", "ms": "ms"}, report.slowest)]
    if report.failed:
        parts += [
            "<h2>Failed</h2>",
            _rows({"uri": "video", "code": "code", "message": "message"}, report.failed),
        ]
        if more := report.failures - len(report.failed):
            parts.append(f"<p>and {more} more</p>")
    if report.left_out:
        parts += ["<h2>Left out of the list</h2>", *(f"<p>{_text(entry)}</p>" for entry in report.left_out)]
    head = (
        f'<meta charset="utf-8"><title>Scores of {_text(report.run["model"])}</title><style>{_STYLE}</style>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def accuracy_line(accuracy: Mapping[str, Any]) -> str:
    """Say what the accuracy of a report is."""
    failed = f"; the {accuracy['failed']} that failed count as wrong" if accuracy["failed"] else ""
    return f"{accuracy['top1']:.1%} of {accuracy['videos']} videos got the label of the list{failed}"


def time_line(seconds: Mapping[str, float]) -> str:
    """Say how long the videos of a report are, and what took how long."""
    return ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())


def drift_lines(drift: Drift) -> dict[str, str]:
    """Say what a drift is, by name, and what could not be compared."""
    here, there = drift.labelled
    if drift.labels_psi is None:
        labels = f"not compared: {here} videos have one, and {there} of the reference"
    else:
        labels = f"PSI {drift.labels_psi:.4f} of {here} videos and {there} (above 0.2 is taken for a shift)"
    here, there = drift.with_vector
    if drift.vector is None:
        vectors = "not compared: the tables have none in common"
    elif drift.mmd is None:
        vectors = f"not compared: {here} videos have one, and {there} of the reference; it takes two of each"
    else:
        seen = " and ".join(f"{min(count, SAMPLE)} of {count}" for count in drift.with_vector)
        vectors = f"MMD² {drift.mmd:.5f}, by chance below {drift.mmd_by_chance:.5f}, of {seen} videos"
    return {"labels": labels, drift.vector or "vectors": vectors}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return escape("" if value is None else cut(one_line(str(value)), SHOWN))


def _facts(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><th>{_text(name.replace('_', ' '))}</th><td>{_text(value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _bars(counts: Mapping[str, int]) -> str:
    most = max([*counts.values(), 1])
    rows = (
        f'<tr><td>{_text(name)}</td><td class="number">{count}</td>'
        f'<td class="bar"><div style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for name, count in counts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _rows(names: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return some columns of rows as a table, each under its name for people."""
    head = "".join(
        _cell("th", text, any(_is_number(row[name]) for row in rows)) for name, text in names.items()
    )
    body = "".join(
        f"<tr>{''.join(_cell('td', row[name], _is_number(row[name])) for name in names)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(kind: str, value: Any, number: bool) -> str:
    return f"<{kind}{_NUMBER if number else ''}>{_text(value)}</{kind}>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
