"""``ivdr import``: somebody else's trained model into a bundle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import console, done, print_json, print_text
from ivdr_deploy.cli._options import JsonOption
from ivdr_deploy.cli._tables import parity_table


def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="i3d-k400, torchvision:NETWORK, or hf:FOLDER."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; an older bundle there is replaced.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="File with the weights; those of i3d-k400 are fetched without it.")
    ] = None,
    frame_stride: Annotated[
        int | None,
        typer.Option(min=1, help="Distance between the frames of a clip; by default as published."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the folder's.")] = None,
    model_version: Annotated[str, typer.Option(help="Version of the model.")] = "1.0",
    as_json: JsonOption = False,
) -> None:
    """Turn a published model into a bundle, if the exported model computes what the published one computes."""
    from ivdr_deploy.cli._describe import describe_clip
    from ivdr_deploy.export.importing import import_model
    from ivdr_deploy.records import to_dict

    with console.status("reading, exporting and comparing with the published network"):
        bundle, imported = import_model(
            source, out, weights=weights, frame_stride=frame_stride, name=name, version=model_version
        )
    manifest = bundle.manifest
    variants = [variant.id for variant in manifest.variants]
    if as_json:
        values = {
            "bundle": str(out),
            "name": manifest.name,
            "variants": variants,
            "labels": len(manifest.labels),
        }
        print_json({**values, "origin": manifest.provenance.origin, "tensors": to_dict(imported.tensors)})
        return
    rows = [(variant.id, entry) for variant in manifest.variants for entry in variant.parity]
    console.print(parity_table(rows, "golden clips: difference from the imported network"))
    numbers = sum(math.prod(tensor.shape) for tensor in imported.tensors)
    console.print(f"{len(imported.tensors)} tensors, {numbers:,} numbers: all used, every shape as expected")
    print_text(f"one clip: {describe_clip(manifest.clip)}; of a video: {manifest.view_plan}")
    for what, text in manifest.provenance.origin.items():
        print_text(f"{what}: {text}", style="dim")
    judged = [variant.id for variant in manifest.variants if variant.parity]
    done(
        f"PASS: {', '.join(judged)}; {manifest.name} {manifest.version} with {len(manifest.labels)} labels -> {out}",
        next_command=("ivdr", "predict", out, "video.mp4"),
    )
