"""``ivdr bench``: what a model costs on this machine, from the encoded file to the label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import console, done, print_json, progress
from ivdr_deploy.spec import Device, Precision, RuntimeName


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.")],
    data: Annotated[Path, typer.Option(help="Videos to time it on: a folder, a csv or a list file.")],
    rounds: Annotated[int, typer.Option(help="Timed passes over the videos.")] = 3,
    runtime: Annotated[RuntimeName | None, typer.Option(help="What is held against torch.")] = None,
    precision: Annotated[Precision, typer.Option(help="Which of the bundle's models.")] = "fp32",
    device: Annotated[Device, typer.Option(help="Where both run.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Threads of each; their own choice when left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Report file.", show_default="build/bench/NAME.json")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time decoding, preprocessing and the network per video, and the engine against torch on the same clips.

    Outputs are compared before anything is timed. Exit code 1 says that some videos could not be used.
    """
    from ivdr_deploy.benchmarks.latency import measure
    from ivdr_deploy.benchmarks.report import build_report, render_report, write_report
    from ivdr_deploy.datasets.lists import read_video_list
    from ivdr_deploy.runtimes.loading import open_model

    videos = read_video_list(data)
    engine = open_model(artifact, runtime=runtime, precision=precision, device=device, threads=threads)
    torch = open_model(artifact, runtime="torch", device=device, threads=threads)
    with engine.runtime, torch.runtime:
        samples = measure(
            engine,
            torch,
            videos,
            rounds=rounds,
            track=lambda steps, total: progress(steps, total=total, description="timing"),
        )
        report = build_report(samples, engine=engine, torch=torch, threads=threads)
    path = out or Path("build/bench") / f"{engine.name}-{engine.runtime.name}-{precision}.json"
    write_report(report, path)
    if as_json:
        print_json(report)
    else:
        console.print(render_report(report))
        for uri, code in samples.failed.items():
            console.print(f"not timed: {uri} ({code})", markup=False)
        done(f"benchmark -> {path}", next_command=f"ivdr show {artifact}")
    if samples.failed:
        raise typer.Exit(1)
