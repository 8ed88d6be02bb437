"""``ivdr score``: a collection of videos into a table of Parquet files."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import console, done, print_json, progress
from ivdr_deploy.cli._options import (
    DeviceOption,
    IsolationOption,
    JsonOption,
    NumClipsOption,
    VariantOption,
    WorkersOption,
    decode_options,
    view_plan,
)


def score(
    artifact: Annotated[Path, typer.Argument(help="A bundle, a checkpoint or an .onnx file.")],
    videos: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="A folder of videos, a csv with the column path, or a list."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the table; continued if it is of this run.")
    ],
    top_k: Annotated[int, typer.Option(help="Labels and scores per video.")] = 5,
    output: Annotated[
        list[str] | None, typer.Option(help="Also store feature, inter or intra; may be repeated.")
    ] = None,
    num_clips: NumClipsOption = None,
    hash_files: Annotated[bool, typer.Option("--hash", help="Store the SHA-256 of every file.")] = False,
    variant: VariantOption = None,
    device: DeviceOption = None,
    decode_workers: WorkersOption = None,
    isolation: IsolationOption = "process",
    as_json: JsonOption = False,
) -> None:
    """Score every video of a collection: one row per input, a bad video being a row with its reason.

    Stop it whenever you like: the same command goes on where it stopped. Exit code 1: some videos failed.
    """
    from ivdr_deploy.datasets.lists import read_video_list
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model
    from ivdr_deploy.scoring import ScoreOptions
    from ivdr_deploy.scoring import score as score_videos

    items = read_video_list(videos)
    model = open_model(artifact, variant=variant, device=device)
    options = ScoreOptions(
        top_k=top_k,
        outputs=tuple(output or ()),
        view_plan=view_plan(model.view_plan, num_clips),
        hash_files=hash_files,
    )
    decode = decode_options(decode_workers, isolation)
    with model.runtime, VideoPredictor(model, decode=decode) as predictor:
        summary = score_videos(predictor, items, out, options=options, track=progress)
    rate = summary.scored / summary.seconds
    if as_json:
        print_json({**asdict(summary), "folder": str(summary.folder), "videos_per_s": rate})
    else:
        reasons = ", ".join(f"{code} {count}" for code, count in summary.errors.items())
        console.print(f"{summary.ok} ok, {summary.failed} failed{f' ({reasons})' if reasons else ''}")
        if not summary.scored:
            did = "nothing to do: the table is complete"
        else:
            did = (
                f"scored {summary.scored} of {summary.videos} in {summary.seconds:.1f} s, {rate:.1f} videos/s"
            )
        read = f"from ivdr_deploy.scoring import read_scores; print(read_scores({str(out)!r}))"
        done(f"{did} -> {out}", next_command=f"python -c {shlex.quote(read)}")
    if summary.failed:
        raise typer.Exit(1)
