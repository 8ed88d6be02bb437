"""``ivdr scores``: what is in a score table, and what differs between two."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ivdr_deploy._console import done, print_json, print_line
from ivdr_deploy._text import cut
from ivdr_deploy.cli._options import JsonOption

if TYPE_CHECKING:
    from ivdr_deploy.scoring.difference import Difference
    from ivdr_deploy.scoring.report import Report

_SHOWN = 10
"""Labels, and slowest and failed inputs, that the text shows; JSON and page have more."""


def scores(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="What `ivdr score` wrote, finished or not.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="Say how far labels and features are from this table's."),
    ] = None,
    diff: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Say what differs between this table and the other.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one page.")] = None,
    lance: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Also write the rows as a Lance data set, to be searched by vectors."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show outcomes, labels, confidence, the slowest and the failed videos of a score table.

    Exit code 1: with --diff, something differs by more than the last digits, or a table is not finished.
    """
    from ivdr_deploy.errors import ConfigError
    from ivdr_deploy.scoring.difference import difference
    from ivdr_deploy.scoring.report import report

    if diff is not None:
        if html is not None or reference is not None or lance is not None:
            raise ConfigError("--diff goes with none of --html, --reference, --lance", hint="leave them out")
        found = difference(diff, table)
        if as_json:
            print_json(asdict(found))
        else:
            _show_difference(found)
        if found.plan or any(found.counts.values()) or not found.complete:
            raise typer.Exit(1)
        return
    summary = report(table, reference=reference)
    if as_json:
        print_json(asdict(summary))
    else:
        _show(summary)
    if html is not None:
        from ivdr_deploy._files import atomic_path
        from ivdr_deploy.scoring.page import page

        with atomic_path(html) as temporary:
            temporary.write_text(page(summary), encoding="utf-8")
        done(f"report -> {html}")
    if lance is not None:
        from ivdr_deploy.scoring.lance import write_lance

        done(f"{write_lance(table, lance)} rows -> {lance}")


def _show(report: Report) -> None:
    from ivdr_deploy.scoring.page import accuracy_line, drift_lines, time_line

    print_line(f"table       {report.folder}, {report.state}")
    for entry in report.left_out:
        print_line(f"left out    {entry}")
    print_line(f"model       {_cut(report.run['model'])}, {_cut(report.run['variant'])}")
    print_line(f"ran on      {_cut(report.run['runtime'])}")
    print_line(f"outcomes    {_counts(report.outcomes)}")
    if report.labels:
        print_line(f"labels      {_counts(report.labels)}")
        print_line(
            f"confidence  mean {report.confidence['mean']:.3f}, median {report.confidence['median']:.3f}; "
            f"in tenths {' '.join(map(str, report.confidence['bins']))}"
        )
    if report.accuracy is not None:
        print_line(f"accuracy    {accuracy_line(report.accuracy)}")
    print_line(f"time        {time_line(report.seconds)}")
    if (drift := report.drift) is not None:
        print_line(f"drift       from {drift.reference}, {drift.reference_state}")
        for name, line in drift_lines(drift).items():
            print_line(f"drift       {name}: {line}")
    for row in report.slowest[:_SHOWN]:
        print_line(f"slow        {row['ms']:.0f} ms  {_cut(row['uri'])}")
    for row in report.failed[:_SHOWN]:
        print_line(f"failed      {row['code']}  {_cut(row['uri'])}: {_cut(row['message'])}")
    if more := report.failures - len(report.failed[:_SHOWN]):
        print_line(f"            and {more} more that failed")


def _cut(text: str) -> str:
    from ivdr_deploy.scoring.page import SHOWN

    return cut(text, SHOWN)


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{_cut(name)} {count}" for name, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")


def _show_difference(found: Difference) -> None:
    print_line(f"first       {found.first}, {found.first_state}")
    print_line(f"second      {found.second}, {found.second_state}")
    for name, values in found.plan.items():
        print_line(f"plan        {name}: {values}")
    print_line(f"compared    {found.compared} videos")
    for what, count in found.counts.items():
        if count:
            named = [*map(_cut, found.examples[what][:_SHOWN])]
            more = f" and {count - len(named)} more" if count > len(named) else ""
            print_line(f"differs     {what}: {count} ({', '.join(named)}{more})")
    if not found.complete:
        print_line("not told    rows that are not there yet are not compared")
    if found.largest_score_change is None:
        print_line("scores      not compared: no video has the same label in both")
    else:
        print_line(
            f"scores      moved by {found.largest_score_change:.2g} at most where the label is the same"
        )
