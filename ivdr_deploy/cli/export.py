"""``ivdr export``, ``ivdr verify`` and ``ivdr show``: make a bundle, judge it, look into any artifact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivdr_deploy._console import console, done, print_json, progress

if TYPE_CHECKING:
    from rich.table import Table

    from ivdr_deploy.evaluation.metrics import Accuracy
    from ivdr_deploy.evaluation.verify import ModelReport, VerifyReport
    from ivdr_deploy.spec import OutputParity


def export(
    checkpoint: Annotated[Path, typer.Argument(help="What `python -m train` wrote (.safetensors).")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; an older bundle there is replaced.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the folder's.")] = None,
    model_version: Annotated[str, typer.Option(help="Version of the model.")] = "1.0",
    include_stale: Annotated[
        bool,
        typer.Option("--include-stale", help="Also export heads that were not trained with this backbone."),
    ] = False,
    trt: Annotated[bool, typer.Option("--trt", help="Also build a TensorRT plan.")] = False,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPU that the plan is for, e.g. 8.6; may be repeated.")
    ] = None,
) -> None:
    """Turn a checkpoint into a bundle, if the exported models compute what the trained one computes."""
    from ivdr_deploy.errors import ConfigError
    from ivdr_deploy.export.bundle_export import export_bundle

    if compute_capability and not trt:
        raise ConfigError("--compute-capability is for a TensorRT plan", hint="add --trt")
    with console.status("exporting and comparing with the trained network"):
        bundle = export_bundle(
            checkpoint,
            out,
            name=name,
            version=model_version,
            include_stale=include_stale,
            tensorrt=trt,
            compute_capabilities=compute_capability,
        )
    manifest = bundle.manifest
    console.print(_parity_table(manifest.parity, "golden clips"))
    outputs = ", ".join(manifest.output_names)
    done(
        f"PASS: {manifest.name} {manifest.version} with {outputs} -> {out}",
        next_command=f"ivdr verify {out} --data test.csv",
    )


def verify(
    bundle: Annotated[Path, typer.Argument(help="What `ivdr export` wrote.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Videos to compare on: a csv with path,label, class folders, or a list."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check that every model of a bundle computes what the trained network computes.

    Exit code 1 says FAIL, or that some videos could not be used.
    """
    from ivdr_deploy.evaluation.verify import verify_bundle

    report = verify_bundle(
        bundle,
        data=data,
        track=lambda outcomes, total: progress(outcomes, total=total, description="verifying"),
    )
    if as_json:
        print_json(report.to_dict())
    else:
        _print_report(report)
        verdict = "PASS" if report.passed else "FAIL"
        seen = f" over {report.videos} videos" if data is not None else " over the golden clips"
        bad = f"; {len(report.bad_videos)} videos could not be used" if report.bad_videos else ""
        done(
            f"{verdict}: {bundle}{seen}{bad}",
            next_command=f"ivdr archive {bundle}" if report.passed else None,
        )
    if not report.passed or report.bad_videos:
        raise typer.Exit(1)


def show(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A checkpoint, bundle, .onnx, .engine, .mar or score table (.parquet)."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what an artifact says about itself: contract, labels, outputs, parity, provenance."""
    from ivdr_deploy.cli._describe import describe

    description = describe(artifact)
    if as_json:
        print_json({"kind": description.kind, **description.values})
        return
    _print_values(description.values)
    done(f"{artifact}: {description.kind}", next_command=description.next_command)


def _parity_table(parity: tuple[OutputParity, ...], where: str) -> Table:
    from rich.table import Table

    table = Table(title=f"agreement with torch over the {where}", title_justify="left")
    for heading in ("model", "output", "max difference", "tolerance", "min cosine", ""):
        table.add_column(heading)
    for entry in parity:
        table.add_row(
            f"{entry.runtime} {entry.precision}",
            entry.output,
            f"{entry.max_abs_diff:.1e}",
            f"{entry.tolerance:.0e}",
            f"{entry.min_cosine:.6f}",
            "ok" if entry.passed else "FAIL",
        )
    return table


def _print_report(report: VerifyReport) -> None:
    from rich.table import Table

    console.print(_parity_table(tuple(e for model in report.models for e in model.golden), "golden clips"))
    if report.videos:
        console.print(
            _parity_table(tuple(e for model in report.models for e in model.parity), "listed videos")
        )
        table = Table(title=f"labels of {report.videos} videos", title_justify="left")
        for heading in ("model", "same label as torch", "accuracy [95 %]", "R@1 [95 %]", ""):
            table.add_column(heading)
        for model in report.models:
            if not model.skipped:
                table.add_row(*_label_row(model))
        console.print(table)
    for model in report.models:
        for flip in model.flips:
            console.print(
                f"flip: {flip.uri}: torch says {flip.expected}, {model.runtime} {model.precision} says"
                f" {flip.found} (torch prefers its own by {flip.margin:.4f})",
                markup=False,
            )
        if model.skipped:
            console.print(f"not run: {model.runtime} {model.precision}: {model.skipped}", markup=False)
    for video in report.bad_videos:
        console.print(f"not used: {video.uri}: {video.message}", markup=False)


def _label_row(model: ModelReport) -> tuple[str, ...]:
    measured = (model.agreement, model.accuracy, model.retrieval)
    figures = [_share(value) if value is not None else "-" for value in measured]
    return (f"{model.runtime} {model.precision}", *figures, "ok" if model.passed else "FAIL")


def _share(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{accuracy.correct}/{accuracy.total} = {accuracy.value:.1%} [{low:.0%}, {high:.0%}]"


def _print_values(values: dict[str, Any]) -> None:
    rows = list(_rows(values))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        # Plain lines, since a table would fold the long values: hashes are there to be copied.
        console.print(f"{name:<{width}}  {value}", markup=False)


def _rows(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested values into (dotted name, text) pairs; a list of records takes one each."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _rows(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from ((f"{name}[{index}]", _one_line(record)) for index, record in enumerate(value))
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _one_line(record: dict[str, Any]) -> str:
    return "  ".join(
        f"{key}={f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in record.items()
        if value is not None
    )
