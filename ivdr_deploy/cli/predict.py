"""``ivdr predict``: label videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivdr_deploy._console import console, print_json, progress
from ivdr_deploy.spec import DecoderName, Device, Precision, RuntimeName

if TYPE_CHECKING:
    from ivdr_deploy.pipeline import Outcome, VideoPredictor


def predict(
    artifact: Annotated[Path, typer.Argument(help="A bundle folder, or a checkpoint (.safetensors).")],
    videos: Annotated[list[Path], typer.Argument(help="Video files, or folders of them.")],
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show for each video.")] = 5,
    num_clips: Annotated[
        int | None, typer.Option(min=1, help="Clips per video, instead of the contract's number.")
    ] = None,
    runtime: Annotated[
        RuntimeName | None, typer.Option(help="What executes the model; by default what the artifact is for.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Which of the exported precisions.")] = "fp32",
    device: Annotated[Device, typer.Option(help="Where it runs; there is no silent fall-back.")] = "cpu",
    decoder: Annotated[DecoderName, typer.Option(help="opencv may read a file that pyav cannot.")] = "pyav",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Label videos with a bundle or a checkpoint.

    A video that cannot be used is reported with its reason and does not stop the others; the exit code is then 1.
    """
    from ivdr_deploy.errors import ArtifactError
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model

    sources = list(_expand(videos))
    model = open_model(artifact, runtime=runtime, precision=precision, device=device)
    with model.runtime:
        if "logits" not in model.output_names:
            raise ArtifactError(
                f"{artifact} has no valid classifier; its outputs are {', '.join(model.output_names)}",
                hint="fine-tune the checkpoint first: python -m train finetune --config FILE init=CHECKPOINT",
            )
        console.print(f"{model.name} on {model.runtime.description}", style="dim", markup=False)
        predictor = VideoPredictor(model, decoder=decoder)
        outcomes = predictor.predict_many(sources, num_clips=num_clips)
        failures = 0
        for source, outcome in zip(
            sources, progress(outcomes, total=len(sources), description="predict"), strict=True
        ):
            failures += outcome.error is not None
            _report(source, outcome, predictor, top_k=top_k, as_json=as_json)
    if failures:
        console.print(f"{failures} of {len(sources)} videos could not be used", markup=False)
        raise typer.Exit(1)


def _expand(paths: list[Path]) -> Iterator[Path]:
    from ivdr_deploy.datasets.lists import read_video_list

    for path in paths:
        if path.is_dir():
            yield from (item.path for item in read_video_list(path).items)
        else:
            yield path


def prediction_line(uri: str, outcome: Outcome, predictor: VideoPredictor, *, top_k: int) -> dict[str, Any]:
    """Return the object that ``--json`` prints for one video."""
    top = outcome.result.top(predictor.model.labels, top_k) if outcome.result else []
    return {
        "uri": uri,
        "predictions": [{"label": label, "score": score} for label, score in top],
        "error": outcome.error.to_dict() if outcome.error else None,
    }


def _report(source: Path, outcome: Outcome, predictor: VideoPredictor, *, top_k: int, as_json: bool) -> None:
    line = prediction_line(str(source), outcome, predictor, top_k=top_k)
    if as_json:
        print_json(line)
    elif outcome.error is not None:
        typer.echo(f"{source}: error {outcome.error.code}: {outcome.error}")
    else:
        typer.echo(
            f"{source}: " + "  ".join(f"{top['label']} {top['score']:.3f}" for top in line["predictions"])
        )
