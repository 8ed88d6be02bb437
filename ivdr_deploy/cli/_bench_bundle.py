"""``ivdr bench BUNDLE``: on videos, or variant against variant."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import typer

from ivdr_deploy._console import console, done, print_json, print_text, progress
from ivdr_deploy._files import try_beside
from ivdr_deploy._text import as_file_name, quoted
from ivdr_deploy.cli._options import any_unread, decode_options, read_list, video_limits
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import DecoderName, Device


def bench_videos(
    artifact: Path,
    videos: Path | None,
    *,
    variant: str | None,
    against: str | None,
    device: Device | None,
    decoder: DecoderName,
    threads: int | None,
    rounds: int | None,
    containers: Sequence[str] | None,
    root: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time one variant on videos, against another one where there is one; see ``bench``."""
    from ivdr_deploy.benchmarks.latency import measure
    from ivdr_deploy.benchmarks.report import build_report, render_report, write_report
    from ivdr_deploy.errors import DeviceError, EngineIncompatibleError, MissingDependencyError
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.runtimes.loading import open_model
    from ivdr_deploy.runtimes.variants import reference_id

    if videos is None:
        raise ConfigError(
            "there are no videos to time it on",
            hint="give them with --videos, or time the variants with --speeds",
        )
    limits = video_limits(containers)
    listed = read_list(videos, root=root)
    engine = open_model(artifact, variant=variant, device=device, threads=threads, decoder=decoder)
    with ExitStack() as stack:
        stack.enter_context(engine.runtime)
        other, missing = against or reference_id(artifact), ""
        if against == engine.variant:
            raise ConfigError(
                f"{quoted(engine.variant)} would be compared with itself",
                hint="name another one with --against, or leave it out to compare with the reference",
            )
        reference = None
        if other and other != engine.variant:
            try:
                reference = open_model(artifact, variant=other, device=device, threads=threads)
                stack.enter_context(reference.runtime)
            except (MissingDependencyError, EngineIncompatibleError, DeviceError) as error:
                if against:
                    raise
                missing = f"{other} does not run here: {error}"
        else:
            missing = f"{engine.variant} is the reference" if other else "no reference"
        path = out or Path("build/bench") / f"{as_file_name(engine.name)}-{as_file_name(engine.variant)}.json"
        try_beside(path)  # before the minutes of work that could not be kept
        decode = decode_options(1, "process")
        predictor = stack.enter_context(VideoPredictor(engine, limits=limits, decoder=decoder, decode=decode))
        samples = measure(
            predictor, reference, listed, rounds=3 if rounds is None else rounds, track=progress
        )
        report = build_report(
            samples, engine=engine, reference=reference, threads=threads, not_compared=missing
        )
    if as_json:
        print_json(report)
    else:
        console.print(render_report(report))
        if missing:
            print_text(f"not compared: {missing}")
        for uri, code in samples.failed.items():
            print_text(f"not timed: {uri} ({code})")
    write_report(report, path)  # when it is printed: a figure that took minutes is never lost
    if not as_json:
        done(f"benchmark -> {path}", next_command=("ivdr", "show", artifact))
    if samples.failed or any_unread(listed.left_out):
        raise typer.Exit(1)


def bench_speeds(
    path: Path,
    names: Sequence[str],
    turns: int | None,
    device: Device | None,
    threads: int | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Time the variants against each other, and keep the result in the bundle; see ``bench``."""
    from ivdr_deploy.artifacts.bundle import check_replaceable, open_bundle
    from ivdr_deploy.benchmarks.engines import TURNS, time_variants, timed_variants
    from ivdr_deploy.benchmarks.report import write_report
    from ivdr_deploy.benchmarks.speeds import found_speeds, keep_speeds, render_speeds, speed_report
    from ivdr_deploy.benchmarks.timing import LEAST_TURNS
    from ivdr_deploy.environment import engine_threads, environment_facts, has_nvidia_driver

    if turns is not None and turns < LEAST_TURNS:
        raise ConfigError(
            f"--rounds must be at least {LEAST_TURNS} with --speeds, found {turns}",
            hint="fewer turns have no 95 % interval; 9 are taken without it",
        )
    bundle = open_bundle(path)
    written = out or Path("build/bench") / f"{as_file_name(bundle.manifest.name)}-speeds.json"
    check_replaceable(path)  # before the minutes of work that could not be kept
    for target in (path, written):
        try_beside(target)
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
    speeds = found_speeds(bundle, timing, load_average=facts["load_average"])
    report = speed_report(bundle, timing, speeds, left_out, facts)
    if as_json:
        print_json(report)
    else:
        console.print(render_speeds(report))
        for name, reason in left_out.items():
            print_text(f"not timed: {name}: {reason}")
        if facts["load_average"] > facts["cores"] / 2:
            console.print(
                f"other processes were running (load {facts['load_average']} on {facts['cores']} cores)"
            )
    write_report(report, written)
    keep_speeds(bundle, speeds)  # last: the bundle may have been changed meanwhile
    if not as_json:
        done(f"speeds -> {path}; all turns -> {written}", next_command=("ivdr", "show", path))
