"""``python -m train evaluate``: every protocol, one report each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ivdr_deploy._console import console, done, print_json, print_text
from ivdr_deploy._text import one_line, quoted
from ivdr_deploy.datasets.entries import any_unread
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.evaluation.bootstrap import Estimate
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.reader import VideoLimits
from train.comparison import compare
from train.evaluate import ANSWERS, PROTOCOLS, evaluate
from train.features import forget
from train.frozen import classify, open_frozen, retrieve
from train.order_audit import CHANGES, audit_order
from train.page import write_evaluation, write_report
from train.report import EvaluationReport, say_failed

_FROZEN = ("retrieval", "knn", "linear-probe")


def run(options: argparse.Namespace) -> int:
    """Measure as the options say, and return the exit code: 1 if a video or a folder of a list could not be used.

    Raises:
        ConfigError: if options do not fit together.
    """
    frozen = options.protocol in _FROZEN
    if frozen != bool(options.gallery):
        raise ConfigError(
            f"--gallery goes with --protocol {', '.join(_FROZEN)}, and they need it",
            hint="the gallery is usually the training list",
        )
    if options.against and (frozen or options.protocol == "order"):
        raise ConfigError(
            f"--against compares accuracies; it does not go with --protocol {quoted(options.protocol)}"
        )
    if frozen:
        return _frozen(options)
    return _order(options) if options.protocol == "order" else _accuracy(options)


def _accuracy(options: argparse.Namespace) -> int:
    plan, origin = None, "the checkpoint's plan"
    if options.clips is not None:
        plan, origin = ViewPlan(num_clips=options.clips), f"--clips {options.clips}"
    elif options.protocol:
        plan, origin = PROTOCOLS[options.protocol], f"--protocol {options.protocol}"
    how: dict[str, Any] = {"root": options.root, "limits": _limits(options), "device": options.device}
    if options.against and options.out:  # of both, until both are measured
        how["kept"] = Path(options.out) / ANSWERS
    report = evaluate(options.checkpoint, options.videos, plan=plan, out=options.out, **how)
    extra: dict[str, Any] = {}
    if options.against:
        other = evaluate(options.against, options.videos, plan=report.view_plan, **how)
        extra = _compare(options, report, other)
        if options.out:
            forget(how["kept"])
    code = _show(options, report, extra, f"on {report.view_plan} ({origin})")
    return 1 if options.against and other.failed else code


def _compare(
    options: argparse.Namespace, report: EvaluationReport, other: EvaluationReport
) -> dict[str, Any]:
    """Say and write what is different with another model; returns it as the report holds it."""
    comparison = compare(other, report)
    extra = {"comparison": comparison.to_dict()}
    if options.out:
        write_report(Path(options.out), report.to_dict() | extra)
    said = set(report.failed)  # what no model can use is said once
    say_failed((one for one in other.failed if one not in said), what=f"failed with {options.against}:")
    print_text(f"against {options.against}: {comparison}")
    return extra


def _show(options: argparse.Namespace, report: EvaluationReport, extra: dict[str, Any], how: str) -> int:
    say_failed(report.failed)
    if options.json:
        print_json(report.to_dict() | extra)
    else:
        table = Table("class", "right", "of", "accuracy")
        for label, accuracy in report.per_class.items():
            shown = f"{accuracy.value:.1%}" if accuracy.total else "-"
            table.add_row(Text(one_line(label)), str(accuracy.correct), str(accuracy.total), shown)
        console.print(table)
    print_text(f"intervals over {report.video_estimate.units} units: {report.units}")
    print_text(f"clip accuracy {_said(report.clip_accuracy, report.clip_estimate)}")
    if options.out:
        print_text(f"wrote {Path(options.out) / 'page.html'}")
    done(f"video accuracy {_said(report.video_accuracy, report.video_estimate)}, {how}")
    return 1 if report.failed or any_unread(report.left_out) else 0


def _frozen(options: argparse.Namespace) -> int:
    model = open_model(options.checkpoint, device=options.device)
    frozen = open_frozen(
        model, options.gallery, options.videos, options.cache, root=options.root, limits=_limits(options)
    )
    if options.protocol != "retrieval":
        report = classify(frozen, options.protocol)
        if options.out:
            write_evaluation(Path(options.out), report, frozen.queries, model, limits=_limits(options))
        return _show(
            options, report, {"protocol": options.protocol}, f"{options.protocol}, on {report.view_plan}"
        )
    found = retrieve(frozen)
    say_failed(found.failed)
    if options.json:
        print_json(found.to_dict())
    _write_report(options, found.to_dict())
    for k, recall in found.recalls.items():
        print_text(f"R@{k} {recall}")
    done(
        f"retrieval: {found.queries} queries in {found.gallery_videos} videos, on {found.view_plan}; "
        f"R@1 {found.recalls[1]}"
    )
    return 1 if found.failed or any_unread(found.left_out) else 0


def _order(options: argparse.Namespace) -> int:
    model = open_model(options.checkpoint, device=options.device)
    with model.runtime:
        videos = read_video_list(options.videos, root=options.root, part="test")
        audit = audit_order(model, videos, limits=_limits(options))
    found = audit.to_dict()
    say_failed((one["uri"], one["reason"]) for one in found["failed"])
    if options.json:
        print_json(found)
    else:
        table = Table(
            "class", "videos", *(f"{name}" for name in CHANGES), "change reversed", "change shuffled"
        )
        for label, row in found["per_class"].items():
            cells = [row[f"accuracy_{name}"] for name in CHANGES]
            moved = [row[f"feature_change_{name}"] for name in CHANGES[1:]]
            table.add_row(
                Text(one_line(label)),  # as text: rich would take what is in brackets for a style
                str(row["videos"]),
                *(f"{cell:.0%}" for cell in cells),
                *("-" if cell is None else f"{cell:.3f}" for cell in moved),
            )
        console.print(table)
    _write_report(options, found)
    for name in CHANGES[1:]:
        moved, drop = found["feature_change"][name], found["drop"][name]
        print_text(
            f"{name}: accuracy {found['video_accuracy'][name]['value']:.1%}, "
            f"{0.0 - 100 * drop['value']:+.1f} points; the feature moves by "
            + ("-" if moved is None else f"{moved:.4f}"),
        )
    done(
        f"order audit of {len(videos.items)} videos with {found['segments']} segments: "
        f"accuracy {found['video_accuracy']['true']['value']:.1%} as they are"
    )
    return 1 if found["failed"] or any_unread(audit.left_out) else 0


def _write_report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write the report of a protocol that has no page."""
    if options.out:
        write_report(Path(options.out), found)
        print_text(f"wrote {Path(options.out) / 'report.json'}")


def _limits(options: argparse.Namespace) -> VideoLimits:
    return VideoLimits.allowing(options.allow_container)


def _said(accuracy: Accuracy, estimate: Estimate) -> str:
    return f"{estimate} ({accuracy.correct}/{accuracy.total})"
