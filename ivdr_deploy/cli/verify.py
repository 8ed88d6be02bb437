"""``ivdr verify``: does every variant of a bundle compute what its reference computes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivdr_deploy._console import console, done, print_json, print_text, progress
from ivdr_deploy._text import one_line
from ivdr_deploy.cli._options import (
    VIDEOS_HELP,
    AllowContainerOption,
    GivenDecoderOption,
    JsonOption,
    RootOption,
    any_unread,
    read_list,
    refuse_given,
    video_limits,
)
from ivdr_deploy.cli._tables import parity_table, table
from ivdr_deploy.spec import Device

if TYPE_CHECKING:
    from rich.table import Table

    from ivdr_deploy.evaluation.metrics import Accuracy
    from ivdr_deploy.evaluation.paired import PairedChange
    from ivdr_deploy.evaluation.verify_report import VariantReport, VerifyReport

_SHOWN = 20
"""Flips of a variant, and other videos of a kind, that are printed; --json has all."""


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `ivdr export` wrote.")],
    videos: Annotated[
        Path | None, typer.Option("--videos", "--data", help=f"Videos to compare on: {VIDEOS_HELP}")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Judge this variant only; may be repeated. By default all but machine code."),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            help="Where what runs on either is judged, beside the reference on the CPU.", show_default="cpu"
        ),
    ] = None,
    recheck: Annotated[
        bool,
        typer.Option("--recheck", help="Judge what the last run kept in the bundle again; runs nothing."),
    ] = False,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="With --recheck: judge by this, for every precision; may be repeated. An unknown name shows all.",
        ),
    ] = None,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Leave the bundle as it is: keep no record in it.")
    ] = False,
    decoder_skew: Annotated[
        bool,
        typer.Option(
            "--decoder-skew",
            help="Also decode each video with PyAV and OpenCV and show how they differ; not judged.",
        ),
    ] = False,
    decoder: GivenDecoderOption = None,
    root: RootOption = None,
    allow_container: AllowContainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that every variant of a bundle computes what its reference computes.

    Over videos, what was measured and the verdict are kept in the bundle. Exit code 1 says FAIL, that a variant could
    not run here, that some videos could not be used, or that a folder of the list could not be read.
    """
    from ivdr_deploy.evaluation.records import keep_records
    from ivdr_deploy.evaluation.thresholds import parse_thresholds
    from ivdr_deploy.evaluation.verify import recheck_bundle, verify_bundle

    of_videos: dict[str, Any] = {
        "decoder_skew": decoder_skew,
        "root": root,
        "allow_container": allow_container,
    }
    if recheck:
        refuse_given(
            "is for a run, and --recheck runs nothing",
            videos=videos,
            no_record=no_record,
            device=device,
            decoder=decoder,
            **of_videos,
        )
    else:
        refuse_given("is for --recheck", hint="verify first, then add --recheck", threshold=threshold)
    if videos is None:
        refuse_given("needs videos", hint="give them with --videos", **of_videos)
    keeping = videos is not None and not no_record
    if recheck:
        listed = None
        report = recheck_bundle(bundle, variants=variant or (), thresholds=parse_thresholds(threshold or ()))
    else:
        limits = video_limits(allow_container)
        listed = read_list(videos, root=root, part="test") if videos is not None else None
        if keeping:
            _check_keeping(bundle)
        report = verify_bundle(
            bundle,
            data=listed,
            variants=variant or (),
            device=device or "cpu",
            limits=limits,
            decoder=decoder or "pyav",
            decoder_skew=decoder_skew,
            track=progress,
        )
    if as_json:
        left_out = [asdict(entry) for entry in listed.left_out] if listed is not None else []
        print_json({**report.to_dict(), "left_out": left_out})
    else:
        _print_report(report, rechecked=recheck)
    if keeping:
        keep_records(bundle, report.variants)
    unread = listed is not None and any_unread(listed.left_out)
    if not as_json:
        _conclude(bundle, report, kept=keeping, rechecked=recheck, unread=unread)
    if not report.passed or report.unusable or unread:
        raise typer.Exit(1)


def _check_keeping(bundle: Path) -> None:
    """Refuse a bundle that cannot be changed, before the minutes of work that could not be kept."""
    from ivdr_deploy._files import try_beside
    from ivdr_deploy.artifacts.bundle import check_replaceable

    check_replaceable(bundle)
    try:
        try_beside(bundle)
    except OSError as error:
        said = f"{error.strerror}, so no record can be kept in {bundle}; --no-record does without"
        raise OSError(error.errno, said, error.filename) from error


def _conclude(bundle: Path, report: VerifyReport, *, kept: bool, rechecked: bool, unread: bool) -> None:
    not_run = [found.id for found in report.variants if found.not_run]
    bad = f"; {report.unusable} videos could not be used" if report.unusable else ""
    bad += "; some folders could not be read" if unread else ""
    absent = f"; not run, so not judged: {', '.join(not_run)} (--variant chooses)" if not_run else ""
    absent += f"; not named, so not judged: {', '.join(report.not_named)}" if report.not_named else ""
    record = "; the records are in the bundle" if kept else "; nothing was run" if rechecked else ""
    done(
        f"{'PASS' if report.passed else 'FAIL'}: {bundle} over {_seen(report)}{bad}{absent}{record}",
        next_command=("ivdr", "archive", bundle) if report.passed else (),
    )


def _seen(report: VerifyReport) -> str:
    """Say what was judged by; where records are of several runs, which variants saw which videos."""
    runs: dict[tuple[int, str], list[str]] = {}
    for found in report.variants:
        if found.record is not None:
            runs.setdefault((len(found.record.videos.uris), found.record.data), []).append(found.id)
    if not report.videos:
        return "the golden clips"
    if len(runs) == 1:
        return f"{report.videos} videos"
    return ", ".join(
        f"{count} videos of {one_line(Path(data).name)} ({', '.join(ids)})"
        for (count, data), ids in runs.items()
    )


def _print_report(report: VerifyReport, *, rechecked: bool) -> None:
    golden = [(variant.id, entry) for variant in report.variants for entry in variant.golden]
    if golden:
        console.print(parity_table(golden, "golden clips: difference from the recorded outputs"))
    elif not rechecked and not any(variant.record and variant.record.failure for variant in report.variants):
        print_text("the bundle holds no golden clips: none were replayed")
    for name, difference in report.decode_mean_diff.items():
        print_text(f"golden video {name}: decoded within {difference:.2f} levels")
    if not report.decode_mean_diff and not rechecked:
        print_text("the bundle holds no golden videos: that frames are decoded right here was not looked at")
    if report.videos:
        rows = [(variant.id, entry) for variant in report.variants for entry in variant.parity]
        console.print(parity_table(rows, f"{_seen(report)}: difference from the reference"))
        console.print(_label_table(report))
        console.print(_feature_table(report))
    for variant in report.variants:
        _print_variant(variant)
    for video in report.bad_videos:
        print_text(f"not used: {video.uri}: {video.message}")
    _print_skew(report)


def _print_variant(variant: VariantReport) -> None:
    """Print what a table has no room for: failed checks, flips, and what company and change of the input do."""
    if variant.not_run:
        print_text(f"not run: {variant.id}: {variant.not_run}")
    for check in variant.checks:
        if check.name in ("batch", "sensitivity") and check.passed:
            print_text(f"{variant.id}: {check.name}: {check.text}")
    _print_some(
        [
            f"flip: {flip.uri}: the reference says {flip.expected}, {variant.id} says"
            f" {flip.found} (the reference prefers its own by {flip.margin:.4f})"
            for flip in sorted(variant.flips, key=lambda flip: -flip.margin)
        ]
    )
    if variant.confidence is not None:
        _print_some(
            [
                f"crosses {variant.confidence.abstain:g}: {entry.uri}: confidence {entry.expected:.4f} by the "
                f"reference, {entry.found:.4f} by {variant.id}"
                for entry in variant.confidence.crossings
            ]
        )
    for check in variant.failures:
        print_text(f"FAIL {variant.id}: {check.name}: {check.text}")


def _print_skew(report: VerifyReport) -> None:
    if not report.skew:
        return
    known = [video for video in report.skew if video.mean_diff is not None]
    flips = [video for video in known if video.expected != video.found]
    largest = max((video.mean_diff for video in known if video.mean_diff is not None), default=0.0)
    print_text(
        f"PyAV and OpenCV: {len(known)} videos within {largest:.2f} levels, {len(flips)} with another label, "
        f"{len(report.skew) - len(known)} not compared",
    )
    _print_some(
        [f"decoder flip: {video.uri}: {video.expected} by PyAV, {video.found} by OpenCV" for video in flips]
    )
    _print_some([f"not compared: {video.uri}: {video.error}" for video in report.skew if video.error])


def _print_some(lines: Sequence[str]) -> None:
    for line in lines[:_SHOWN]:
        print_text(line)
    if len(lines) > _SHOWN:
        print_text(f"and {len(lines) - _SHOWN} more; --json has all")


def _label_table(report: VerifyReport) -> Table:
    return table(
        f"labels of {_seen(report)} ({report.view_plan})",
        ("variant", "same label as reference", "accuracy [95 %]", "change [95 %]", ""),
        (
            (
                variant.id,
                _share(variant.agreement),
                _share(variant.accuracy),
                _change(variant.accuracy_change),
                "ok" if variant.passed else "FAIL",
            )
            for variant in report.variants
            if not variant.not_run
        ),
    )


def _feature_table(report: VerifyReport) -> Table:
    return table(
        "retrieval and confidence",
        ("variant", "R@1 [95 %]", "change [95 %]", "mean confidence", "calibration error"),
        (
            (
                variant.id,
                _share(variant.recall),
                _change(variant.recall_change),
                f"{found.mean:.4f}" if (found := variant.confidence) else "-",
                f"{found.ece:.4f}" if found and found.ece is not None else "-",
            )
            for variant in report.variants
            if not variant.not_run
        ),
    )


def _share(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    low, high = accuracy.interval
    return f"{accuracy.correct}/{accuracy.total} = {accuracy.value:.1%} [{low:.0%}, {high:.0%}]"


def _change(change: PairedChange | None) -> str:
    if change is None:
        return "-"
    low, high = change.interval
    return f"{change.value:+.1%} [{low:+.0%}, {high:+.0%}]"
