"""``ivdr score``: a collection of videos into a table of Parquet files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import console, done, print_json, progress
from ivdr_deploy.cli._options import (
    VIDEOS_HELP,
    AllowContainerOption,
    DecoderOption,
    DeviceOption,
    IsolationOption,
    JsonOption,
    NumClipsOption,
    RootOption,
    VariantOption,
    WorkersOption,
    decode_options,
    read_list,
    video_limits,
    view_plan,
)


def score(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A bundle, a checkpoint or an .onnx file.")
    ],
    videos: Annotated[
        Path,
        typer.Argument(metavar="VIDEOS", help=f"Videos to score: {VIDEOS_HELP}"),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the table; continued if it is of this run.")
    ],
    top_k: Annotated[int, typer.Option(help="Labels and scores per video.")] = 5,
    output: Annotated[
        list[str] | None, typer.Option(help="Also store feature, inter or intra; may be repeated.")
    ] = None,
    num_clips: NumClipsOption = None,
    hash_files: Annotated[
        bool,
        typer.Option(
            "--hash", help="Store the SHA-256 of every file, and refuse to go on if one was replaced."
        ),
    ] = False,
    variant: VariantOption = None,
    device: DeviceOption = None,
    decoder: DecoderOption = "pyav",
    decode_workers: WorkersOption = None,
    isolation: IsolationOption = "process",
    root: RootOption = None,
    allow_container: AllowContainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score every video of a collection: one row per input, a bad video being a row with its reason.

    Stop it whenever you like: the same command goes on where it stopped. Exit code 1: some videos failed; 130 or 143:
    stopped by Ctrl-C or SIGTERM.
    """
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model
    from ivdr_deploy.scoring import ScoreOptions
    from ivdr_deploy.scoring import score as score_videos

    limits = video_limits(allow_container)
    items = read_list(videos, root=root)
    model = open_model(artifact, variant=variant, device=device, decoder=decoder)
    options = ScoreOptions(
        top_k=top_k,
        outputs=tuple(output or ()),
        view_plan=view_plan(model.view_plan, num_clips),
        hash_files=hash_files,
    )
    decode = decode_options(decode_workers, isolation)
    with model.runtime, VideoPredictor(model, limits=limits, decoder=decoder, decode=decode) as predictor:
        try:
            summary = score_videos(predictor, items, out, options=options, track=progress)
        except KeyboardInterrupt:
            console.print(
                f"stopped: the rows that are in {out} stay, and the same command goes on from there",
                markup=False,
            )
            raise
    rate = summary.scored / summary.seconds
    if as_json:
        left_out = [asdict(entry) for entry in items.left_out]
        print_json(
            {**asdict(summary), "folder": str(summary.folder), "videos_per_s": rate, "left_out": left_out}
        )
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
        done(f"{did} -> {out}", next_command=("python", "-c", read))
    if summary.failed:
        raise typer.Exit(1)
