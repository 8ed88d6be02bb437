"""``ivdr export``: a checkpoint into a bundle, or more variants into a bundle."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ivdr_deploy._console import console, done, print_json, print_text
from ivdr_deploy.cli._options import (
    VIDEOS_HELP,
    AllowContainerOption,
    JsonOption,
    RootOption,
    any_unread,
    read_list,
    refuse_given,
    video_limits,
)
from ivdr_deploy.cli._tables import parity_table
from ivdr_deploy.errors import ConfigError

if TYPE_CHECKING:
    from ivdr_deploy.artifacts.bundle import Bundle
    from ivdr_deploy.export.steps import Request, StepOptions


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="What `python -m train` wrote (.safetensors), or a bundle to add a variant to.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to write; an older bundle there is replaced. Not for a bundle."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the folder's.")] = None,
    model_version: Annotated[
        str | None, typer.Option(help="Version of the model.", show_default="1.0")
    ] = None,
    include_stale: Annotated[
        bool,
        typer.Option("--include-stale", help="Also export heads that were not trained with this backbone."),
    ] = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="Engine of the variants to add: onnx, torch, aoti or trt; may be repeated."
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="Their precision: fp32, fp16, bf16, int8 or fp8; may be repeated."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Add every variant that can be built on this machine.")
    ] = False,
    trt: Annotated[bool, typer.Option("--trt", help="The same as --engine trt.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(help=f"Some tens of videos that int8 and fp8 are calibrated on: {VIDEOS_HELP}"),
    ] = None,
    root: RootOption = None,
    allow_container: AllowContainerOption = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPU that a plan is for, e.g. 8.6; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle, or add variants to a bundle; each must compute what the trained network does.

    A bundle begins with the checkpoint itself and an fp32 ONNX file. --engine and --precision add to that: one variant
    for every pair of them; onnx and fp32 where only one of the two is given. The other variants stay as they are.
    What is asked for is added as a whole or not at all; with --all each variant is added by itself. Exit code 1 says
    that a folder of --calibrate could not be read, or that one of --all could not be made; the bundle is written.
    """
    from ivdr_deploy.export.bundle_export import add_variants, export_bundle
    from ivdr_deploy.export.calibration import Calibration
    from ivdr_deploy.export.steps import StepOptions, buildable_steps, requests

    engines = [*(engine or ()), *(["trt"] if trt else ())]
    asked = bool(engines or precision or everything)
    if everything:
        refuse_given("does not go with --all", engine=engine, precision=precision, trt=trt)
    if "trt" not in engines and not everything:
        refuse_given("is for a TensorRT plan", hint="add --trt", compute_capability=compute_capability)
    if not {"int8", "fp8"} & {*(precision or ())} and not everything:
        refuse_given("is for int8 and fp8", hint="add --precision int8", calibrate=calibrate)
    if calibrate is None:
        refuse_given("is for --calibrate", root=root, allow_container=allow_container)
    _check_target(source, out, asked=asked)
    if out is None:
        refuse_given(
            "is for a new bundle", name=name, model_version=model_version, include_stale=include_stale
        )
    # The test part is what the result is judged by.
    videos = read_list(calibrate, root=root, part="train") if calibrate is not None else None
    options = StepOptions(
        calibration=Calibration(videos=videos, limits=video_limits(allow_container)) if videos else None,
        compute_capabilities=compute_capability,
    )
    pairs = [(one, each) for one in engines or ["onnx"] for each in precision or ["fp32"]] if asked else []
    steps, left_out = requests(pairs), dict[str, str]()
    if everything:
        steps, reasons = buildable_steps(options)
        left_out = {f"{one} {each}": reason for (one, each), reason in reasons.items()}
        for request, reason in left_out.items():
            print_text(f"left out: {request}: {reason}")
    failed: list[str] = []
    with console.status("exporting and comparing with the trained network"):
        if out is not None:
            bundle = export_bundle(
                source,
                out,
                name=name,
                version="1.0" if model_version is None else model_version,
                include_stale=include_stale,
                steps=() if everything else steps,
                options=options,
            )
        elif not everything:
            bundle = add_variants(source, steps, options)
        if everything:
            # A new bundle has its ONNX file already.
            rest = [step for step in steps if out is None or step != ("onnx", "fp32")]
            bundle, failures = _add_each(out or source, rest, options, first=bundle.made if out else ())
            failed, left_out = list(failures), left_out | failures
    _report(bundle, out or source, left_out, failed, as_json=as_json)
    if failed or (videos is not None and any_unread(videos.left_out)):
        raise typer.Exit(1)


def _add_each(
    path: Path, steps: Sequence[Request], options: StepOptions, *, first: Sequence[str]
) -> tuple[Bundle, dict[str, str]]:
    """Add variants one by one, and say at once which one cannot be made.

    Args:
        path: The bundle.
        steps: What to add.
        options: What the steps need to be told.
        first: Ids of the variants that were made before.

    Returns:
        The bundle with all that was made, and the reasons why the others were not.
    """
    from ivdr_deploy.artifacts.bundle import open_bundle
    from ivdr_deploy.export.bundle_export import add_each

    made, dropped, failures = [*first], list[str](), dict[str, str]()
    for attempt in add_each(path, steps, options):
        made += attempt.made
        dropped += attempt.dropped
        if attempt.failure:
            name = " ".join(attempt.request)
            failures[name] = attempt.failure
            print_text(f"failed: {name}: {attempt.failure}", style="red")
    bundle = open_bundle(path)
    gone = [name for name in dropped if name not in made]
    return replace(bundle, made=tuple(made), dropped=tuple(gone)), failures


def _check_target(source: Path, out: Path | None, *, asked: bool) -> None:
    """Refuse what names no folder to write, or two."""
    from ivdr_deploy.artifacts.kinds import Kind, identify

    adding = source.is_dir() and identify(source)[0] is Kind.BUNDLE
    if adding and (not asked or out is not None):
        raise ConfigError(
            f"{source} is a bundle: variants are added to it in place",
            hint=f"ivdr export {shlex.quote(str(source))} --engine ... --precision ..., without -o",
        )
    if not adding and out is None:
        raise ConfigError("there is no folder to write the bundle to", hint="give one with -o BUNDLE")


def _report(
    bundle: Bundle, path: Path, left_out: Mapping[str, str], failed: Sequence[str], *, as_json: bool
) -> None:
    """Say what was made and how far it is from the trained network, and what the bundle holds besides."""
    manifest = bundle.manifest
    made = [variant for variant in manifest.variants if variant.id in bundle.made]
    held = [variant.id for variant in manifest.variants if variant not in made]
    if as_json:
        print_json(
            {
                "bundle": str(path),
                "name": manifest.name,
                "variants": [variant.id for variant in manifest.variants],
                "made": [variant.id for variant in made],
                "dropped": list(bundle.dropped),
                "left_out": dict(left_out),
                "failed": list(failed),
                "unverified": [variant.id for variant in manifest.variants if not variant.verified],
            }
        )
        return
    rows = [(variant.id, entry) for variant in made for entry in variant.parity]
    judged = [variant.id for variant in made if variant.parity]
    not_run = [variant.id for variant in made if not variant.parity and variant.derived_from is not None]
    if rows:
        console.print(parity_table(rows, "golden clips: difference from the trained network"))
    parts = [
        *([f"FAIL: {', '.join(failed)}"] if failed else []),
        *([f"PASS: {', '.join(judged)}"] if judged else []),
        *([f"built, but not run here: {', '.join(not_run)}"] if not_run else []),
        *([f"as they were: {', '.join(held)}"] if held else []),
        *([f"taken out, being of a former ONNX file: {', '.join(bundle.dropped)}"] if bundle.dropped else []),
        f"{manifest.name} {manifest.version} with {', '.join(manifest.output_names)} -> {path}",
    ]
    done("; ".join(parts), next_command=("ivdr", "verify", path, "--videos", "test.csv"))
