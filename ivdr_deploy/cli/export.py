"""``ivdr export``: a checkpoint into a bundle, or one more variant into a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import console, done, print_json
from ivdr_deploy.cli._options import JsonOption
from ivdr_deploy.cli.verify import parity_table


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
    model_version: Annotated[str, typer.Option(help="Version of the model.")] = "1.0",
    include_stale: Annotated[
        bool,
        typer.Option("--include-stale", help="Also export heads that were not trained with this backbone."),
    ] = False,
    trt: Annotated[bool, typer.Option("--trt", help="Also build a TensorRT plan.")] = False,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPU that the plan is for, e.g. 8.6; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle, if the exported models compute what the trained one computes.

    Given a bundle, add a TensorRT plan to it (--trt); the other variants stay as they are.
    """
    from ivdr_deploy.artifacts.kinds import Kind, identify
    from ivdr_deploy.errors import ConfigError
    from ivdr_deploy.export.bundle_export import add_plan, export_bundle

    if compute_capability and not trt:
        raise ConfigError("--compute-capability is for a TensorRT plan", hint="add --trt")
    adding = source.is_dir() and identify(source)[0] is Kind.BUNDLE
    if adding and (not trt or out is not None):
        raise ConfigError(
            f"{source} is a bundle: a variant is added to it in place",
            hint=f"ivdr export {shlex.quote(str(source))} --trt, without -o",
        )
    if not adding and out is None:
        raise ConfigError("there is no folder to write the bundle to", hint="give one with -o BUNDLE")
    with console.status("exporting and comparing with the trained network"):
        if out is None:
            bundle = add_plan(source, compute_capabilities=compute_capability)
        else:
            bundle = export_bundle(
                source,
                out,
                name=name,
                version=model_version,
                include_stale=include_stale,
                tensorrt=trt,
                compute_capabilities=compute_capability,
            )
    manifest, shown = bundle.manifest, out or source
    variants = [variant.id for variant in manifest.variants]
    unverified = [variant.id for variant in manifest.variants if not variant.verified]
    if as_json:
        print_json(
            {"bundle": str(shown), "name": manifest.name, "variants": variants, "unverified": unverified}
        )
        return
    rows = [(variant.id, entry) for variant in manifest.variants for entry in variant.parity]
    console.print(parity_table(rows, "golden clips: difference from the trained network"))
    outputs = ", ".join(manifest.output_names)
    judged = [variant.id for variant in manifest.variants if variant.parity]
    built = f"; built, but not run here: {', '.join(unverified)}" if unverified else ""
    done(
        f"PASS: {', '.join(judged)}{built}; {manifest.name} {manifest.version} with {outputs} -> {shown}",
        next_command=("ivdr", "verify", shown, "--videos", "test.csv"),
    )
