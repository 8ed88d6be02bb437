"""``ivdr bench``: what a model costs on this machine, from the encoded file to the label."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import console, done, print_json, progress
from ivdr_deploy.cli._options import (
    VIDEOS_HELP,
    AllowContainerOption,
    DecoderOption,
    DeviceOption,
    JsonOption,
    RootOption,
    VariantOption,
    decode_options,
    read_list,
    video_limits,
)


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.")],
    videos: Annotated[Path, typer.Option("--videos", "--data", help=f"Videos to time it on: {VIDEOS_HELP}")],
    rounds: Annotated[int, typer.Option(help="Timed passes over the videos.")] = 3,
    variant: VariantOption = None,
    against: Annotated[
        str | None,
        typer.Option(help="Variant to compare with; by default the reference, where it can run here."),
    ] = None,
    device: DeviceOption = None,
    decoder: DecoderOption = "pyav",
    threads: Annotated[
        int | None, typer.Option(help="Threads of each; their own choice when left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Report file.", show_default="build/bench/NAME.json")
    ] = None,
    root: RootOption = None,
    allow_container: AllowContainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time decoding, preprocessing and the network per video, and one variant against another on the same clips.

    Outputs are compared before anything is timed. Exit code 1 says that some videos could not be used.
    """
    from ivdr_deploy.benchmarks.latency import measure
    from ivdr_deploy.benchmarks.report import build_report, render_report, write_report
    from ivdr_deploy.errors import DeviceError, EngineIncompatibleError, MissingDependencyError
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model
    from ivdr_deploy.runtimes.variants import reference_id

    limits = video_limits(allow_container)
    listed = read_list(videos, root=root)
    engine = open_model(artifact, variant=variant, device=device, threads=threads, decoder=decoder)
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
        decode = decode_options(1, "process")
        predictor = stack.enter_context(VideoPredictor(engine, limits=limits, decoder=decoder, decode=decode))
        samples = measure(predictor, reference, listed, rounds=rounds, track=progress)
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
        done(f"benchmark -> {path}", next_command=("ivdr", "show", artifact))
    if samples.failed:
        raise typer.Exit(1)
