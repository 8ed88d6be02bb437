"""``ivdr bench``: what a model costs on this machine, from the encoded file to the label."""

from __future__ import annotations

from collections.abc import Sequence
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
    decode_options,
    read_list,
    video_limits,
)
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import Device


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle.")],
    videos: Annotated[
        Path | None, typer.Option("--videos", "--data", help=f"Videos to time it on: {VIDEOS_HELP}")
    ] = None,
    speeds: Annotated[
        bool,
        typer.Option(
            "--speeds",
            help="Instead: time every verified variant that can run here against the reference, each in a process of "
            "its own and in turns, on the golden clips, and keep the result in the bundle.",
        ),
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(help="Timed passes over the videos, or turns of each variant.", show_default="3, or 9"),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Which of a bundle's variants; by default the best verified one that fits. With --speeds it may be "
            "repeated, and compiled machine code (aoti) is only timed when it is named."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Variant to compare with; by default the reference, where it can run here."),
    ] = None,
    device: DeviceOption = None,
    decoder: DecoderOption = "pyav",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each; one for a core when left out.")
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

    With --speeds the variants are timed alone, and what is measured decides which one runs by default on machines of
    this kind.
    """
    from ivdr_deploy.benchmarks.latency import measure
    from ivdr_deploy.benchmarks.report import build_report, render_report, write_report
    from ivdr_deploy.errors import DeviceError, EngineIncompatibleError, MissingDependencyError
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model
    from ivdr_deploy.runtimes.variants import reference_id

    if speeds:
        if videos is not None or against is not None:
            raise ConfigError(
                "--speeds times on the golden clips, against the reference",
                hint="leave out --videos and --against",
            )
        _speeds(artifact, variant or (), rounds, device, threads, out, as_json=as_json)
        return
    if videos is None:
        raise ConfigError(
            "there are no videos to time it on",
            hint="give them with --videos, or time the variants with --speeds",
        )
    if len(variant or ()) > 1:
        raise ConfigError(
            "one --variant is timed on videos", hint="several are for --speeds; see also --against"
        )
    limits = video_limits(allow_container)
    listed = read_list(videos, root=root)
    engine = open_model(
        artifact, variant=variant[0] if variant else None, device=device, threads=threads, decoder=decoder
    )
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
        samples = measure(
            predictor, reference, listed, rounds=3 if rounds is None else rounds, track=progress
        )
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


def _speeds(
    path: Path,
    names: Sequence[str],
    turns: int | None,
    device: Device | None,
    threads: int | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    from ivdr_deploy.artifacts.bundle import check_replaceable, open_bundle
    from ivdr_deploy.benchmarks.engines import TURNS, time_variants, timed_variants
    from ivdr_deploy.benchmarks.report import write_report
    from ivdr_deploy.benchmarks.speeds import keep_speeds, render_speeds, speed_report
    from ivdr_deploy.environment import engine_threads, environment_facts, has_nvidia_driver

    bundle = open_bundle(path)
    check_replaceable(path)  # before the minutes of work that could not be kept
    place: Device = device or ("cuda" if has_nvidia_driver() else "cpu")
    chosen, left_out = timed_variants(bundle, names, device=place)
    facts = environment_facts()
    timing = time_variants(
        bundle,
        chosen,
        device=place,
        threads=threads or engine_threads(),
        turns=TURNS if turns is None else turns,
        track=progress,
    )
    kept = keep_speeds(bundle, timing, load_average=facts["load_average"])
    report = speed_report(bundle, timing, kept, left_out, facts)
    written = out or Path("build/bench") / f"{bundle.manifest.name}-speeds.json"
    write_report(report, written)
    if as_json:
        print_json(report)
        return
    console.print(render_speeds(report))
    for name, reason in left_out.items():
        console.print(f"not timed: {name}: {reason}", markup=False)
    if facts["load_average"] > facts["cores"] / 2:
        console.print(
            f"other processes were running (load {facts['load_average']} on {facts['cores']} cores)"
        )
    done(f"speeds -> {path}; all turns -> {written}", next_command=("ivdr", "show", path))
