"""``ivdr predict``: label videos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivdr_deploy._console import print_json, print_line, print_text, progress
from ivdr_deploy._text import as_text, quoted_few
from ivdr_deploy.cli._options import (
    AllowContainerOption,
    DecoderOption,
    DeviceOption,
    IsolationOption,
    NumClipsOption,
    VariantOption,
    WorkersOption,
    any_unread,
    decode_options,
    read_list,
    video_limits,
    view_plan,
)

if TYPE_CHECKING:
    from ivdr_deploy.datasets.entries import LeftOut
    from ivdr_deploy.results import Outcome


def predict(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT", help="A bundle, an archive (.mar), a checkpoint or an .onnx file."
        ),
    ],
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEOS", help="Video files, or folders of them.")],
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show for each video.")] = 5,
    num_clips: NumClipsOption = None,
    variant: VariantOption = None,
    device: DeviceOption = None,
    decoder: DecoderOption = "pyav",
    decode_workers: WorkersOption = None,
    isolation: IsolationOption = "process",
    allow_container: AllowContainerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
    timeline: Annotated[
        bool,
        typer.Option("--timeline", help="Look through the whole of each video, and say what happens when."),
    ] = False,
    hop: Annotated[
        int | None,
        typer.Option(min=1, help="Of --timeline: frames from window to window; by default half a window."),
    ] = None,
    enter: Annotated[
        float | None,
        typer.Option(help="Of --timeline: probability at which an event begins; by default 0.5."),
    ] = None,
    leave: Annotated[
        float | None, typer.Option(help="Of --timeline: probability below which it ends; by default 0.3.")
    ] = None,
    min_seconds: Annotated[
        float | None, typer.Option(help="Of --timeline: what lasts less is no event; by default 0.5.")
    ] = None,
) -> None:
    """Label videos with a bundle or a checkpoint.

    A video that cannot be used is reported with its reason and does not stop the others. Exit code 1: some videos could
    not be used, or a folder could not be read.
    With --timeline a video may be hours long; windows and events are printed as they are found.
    """
    from ivdr_deploy.cli._timeline import chosen_timeline, print_timelines
    from ivdr_deploy.errors import ArtifactError
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model

    timed = chosen_timeline(
        wanted=timeline, num_clips=num_clips, hop=hop, enter=enter, leave=leave, min_seconds=min_seconds
    )
    limits = video_limits(allow_container)
    sources, left_out = _expand(videos)
    model = open_model(artifact, variant=variant, device=device, decoder=decoder)
    with model.runtime:
        if "logits" not in model.output_names:
            raise ArtifactError(
                f"{artifact} has no valid classifier; its outputs are {quoted_few(model.output_names)}",
                hint="fine-tune the checkpoint first: python -m train finetune --config FILE init=CHECKPOINT",
            )
        plan = view_plan(model.view_plan, num_clips)
        print_text(
            f"{model.name}: {model.variant} on {model.runtime.description}; {model.reason}; {plan}",
            style="dim",
        )
        decode = decode_options(decode_workers, isolation)
        failures = 0
        with VideoPredictor(model, limits=limits, decoder=decoder, decode=decode) as predictor:
            if timed is not None:
                failures = print_timelines(predictor, sources, timed, top_k=top_k, as_json=as_json)
            else:
                outcomes = progress(predictor.predict_many(sources, plan=plan), len(sources), "predict")
                for source, outcome in zip(sources, outcomes, strict=True):
                    failures += outcome.error is not None
                    _report(source, outcome, top_k=top_k, as_json=as_json)
    if failures:
        print_text(f"{failures} of {len(sources)} videos could not be used")
    if failures or any_unread(left_out):
        raise typer.Exit(1)


def _expand(paths: list[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Return the videos, those of folders in their place, and what the listings of folders passed over."""
    found: list[Path] = []
    left_out: list[LeftOut] = []
    for path in paths:
        if os.path.isdir(path):  # never raises, whatever the name
            listed = read_list(path)
            found += (item.path for item in listed.items)
            left_out += listed.left_out
        else:
            found.append(path)
    return found, left_out


def prediction_line(uri: str, outcome: Outcome, *, top_k: int) -> dict[str, Any]:
    """Return the object that ``--json`` prints for one video."""
    top = outcome.result.top(top_k) if outcome.result else []
    return {
        "uri": uri,
        "predictions": [{"label": label, "score": score} for label, score in top],
        "error": outcome.error.to_dict() if outcome.error else None,
    }


def _report(source: Path, outcome: Outcome, *, top_k: int, as_json: bool) -> None:
    line = prediction_line(as_text(source), outcome, top_k=top_k)
    if as_json:
        print_json(line)
    elif outcome.error is not None:
        print_line(f"{line['uri']}: error {outcome.error.code}: {outcome.error}")
    else:
        tops = "  ".join(f"{top['label']} {top['score']:.3f}" for top in line["predictions"])
        print_line(f"{line['uri']}: {tops}")
