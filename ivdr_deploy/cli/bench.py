"""``ivdr bench``: what a model costs on this machine, from the encoded file to the label."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import console, done, print_json, progress
from ivdr_deploy.cli._options import DeviceOption, JsonOption, VariantOption, decode_options


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.")],
    data: Annotated[Path, typer.Option(help="Videos to time it on: a folder, a csv or a list file.")],
    rounds: Annotated[int, typer.Option(help="Timed passes over the videos.")] = 3,
    variant: VariantOption = None,
    against: Annotated[
        str | None,
        typer.Option(help="Variant to compare with; by default the reference, where it can run here."),
    ] = None,
    device: DeviceOption = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each; their own choice when left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Report file.", show_default="build/bench/NAME.json")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time decoding, preprocessing and the network per video, and one variant against another on the same clips.

    Outputs are compared before anything is timed. Exit code 1 says that some videos could not be used.
    """
    from ivdr_deploy.benchmarks.latency import measure
    from ivdr_deploy.benchmarks.report import build_report, render_report, write_report
    from ivdr_deploy.datasets.lists import read_video_list
    from ivdr_deploy.errors import DeviceError, EngineIncompatibleError, MissingDependencyError
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model
    from ivdr_deploy.runtimes.variants import reference_id

    videos = read_video_list(data)
    engine = open_model(artifact, variant=variant, device=device, threads=threads)
    with ExitStack() as stack:
        stack.enter_context(engine.runtime)
        other, missing = against or reference_id(artifact), ""
        reference = None
        if other and other != engine.variant:
            try:
                reference = open_model(artifact, variant=other, device=device, threads=threads)
                stack.enter_context(reference.runtime)
            except (MissingDependencyError, EngineIncompatibleError, DeviceError) as error:
                if against:
                    raise
                missing = f"not compared with {other}: {error}"
        predictor = stack.enter_context(VideoPredictor(engine, decode=decode_options(1, "process")))
        samples = measure(predictor, reference, videos, rounds=rounds, track=progress)
        report = build_report(samples, engine=engine, reference=reference, threads=threads)
    path = out or Path("build/bench") / f"{engine.name}-{engine.variant}.json"
    write_report(report, path)
    if as_json:
        print_json(report)
    else:
        console.print(render_report(report))
        if missing:
            console.print(missing, markup=False)
        for uri, code in samples.failed.items():
            console.print(f"not timed: {uri} ({code})", markup=False)
        done(f"benchmark -> {path}", next_command=f"ivdr show {artifact}")
    if samples.failed:
        raise typer.Exit(1)
