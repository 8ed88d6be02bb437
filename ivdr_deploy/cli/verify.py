"""``ivdr verify``: does every variant of a bundle compute what its reference computes?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ivdr_deploy._console import console, done, print_json, progress
from ivdr_deploy.cli._options import (
    VIDEOS_HELP,
    AllowContainerOption,
    DecoderOption,
    JsonOption,
    RootOption,
    read_list,
    video_limits,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ivdr_deploy.artifacts.manifest import OutputParity
    from ivdr_deploy.evaluation.metrics import Accuracy
    from ivdr_deploy.evaluation.verify_report import VariantReport, VerifyReport


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `ivdr export` wrote.")],
    videos: Annotated[
        Path | None, typer.Option("--videos", "--data", help=f"Videos to compare on: {VIDEOS_HELP}")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Judge this variant only; may be repeated. By default all.")
    ] = None,
    decoder: DecoderOption = "pyav",
    root: RootOption = None,
    allow_container: AllowContainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that every variant of a bundle computes what its reference computes.

    Exit code 1 says FAIL, that a variant could not run here, or that some videos could not be used.
    """
    from ivdr_deploy.evaluation.verify import verify_bundle

    limits = video_limits(allow_container)
    listed = read_list(videos, root=root, part="test") if videos is not None else None
    report = verify_bundle(
        bundle, data=listed, variants=variant or (), limits=limits, decoder=decoder, track=progress
    )
    if as_json:
        left_out = [asdict(entry) for entry in listed.left_out] if listed is not None else []
        print_json({**report.to_dict(), "left_out": left_out})
    else:
        _print_report(report)
        not_run = [found.id for found in report.variants if found.not_run]
        verdict = "PASS" if report.passed else "FAIL"
        seen = f" over {report.videos} videos" if videos is not None else " over the golden clips"
        bad = f"; {len(report.bad_videos)} videos could not be used" if report.bad_videos else ""
        absent = f"; not run, so not judged: {', '.join(not_run)} (--variant chooses)" if not_run else ""
        done(
            f"{verdict}: {bundle}{seen}{bad}{absent}",
            next_command=("ivdr", "archive", bundle) if report.passed else (),
        )
    if not report.passed or report.bad_videos:
        raise typer.Exit(1)


def parity_table(rows: list[tuple[str, OutputParity]], title: str) -> Table:
    """Lay out how far each output of each variant is from the reference."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("variant", "output", "max difference", "tolerance", "min cosine", ""):
        table.add_column(heading)
    for name, entry in rows:
        table.add_row(
            name,
            entry.output,
            f"{entry.max_abs_diff:.1e}",
            f"{entry.tolerance:.0e}",
            f"{entry.min_cosine:.6f}",
            "ok" if entry.passed else "FAIL",
        )
    return table


def _print_report(report: VerifyReport) -> None:
    from rich.table import Table

    golden = [(variant.id, entry) for variant in report.variants for entry in variant.golden]
    if golden:
        console.print(parity_table(golden, "golden clips: difference from the recorded outputs"))
    for name, difference in report.decode_mean_diff.items():
        console.print(f"golden video {name}: decoded within {difference:.2f} levels", markup=False)
    if report.videos:
        rows = [(variant.id, entry) for variant in report.variants for entry in variant.parity]
        console.print(parity_table(rows, f"{report.videos} videos: difference from the reference"))
        table = Table(title=f"labels of {report.videos} videos ({report.view_plan})", title_justify="left")
        for heading in ("variant", "same label as reference", "accuracy [95 %]", "R@1 [95 %]", ""):
            table.add_column(heading)
        for variant in report.variants:
            if not variant.not_run:
                table.add_row(*_label_row(variant))
        console.print(table)
    for variant in report.variants:
        for flip in variant.flips:
            console.print(
                f"flip: {flip.uri}: the reference says {flip.expected}, {variant.id} says"
                f" {flip.found} (the reference prefers its own by {flip.margin:.4f})",
                markup=False,
            )
        if variant.not_run:
            console.print(f"not run: {variant.id}: {variant.not_run}", markup=False)
    for video in report.bad_videos:
        console.print(f"not used: {video.uri}: {video.message}", markup=False)


def _label_row(variant: VariantReport) -> tuple[str, ...]:
    measured = (variant.agreement, variant.accuracy, variant.retrieval)
    figures = [_share(value) if value is not None else "-" for value in measured]
    return (variant.id, *figures, "ok" if variant.passed else "FAIL")


def _share(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{accuracy.correct}/{accuracy.total} = {accuracy.value:.1%} [{low:.0%}, {high:.0%}]"
