"""``ivdr bench``: what a model costs on this machine, or what an endpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy.cli._options import (
    VIDEOS_HELP,
    AllowContainerOption,
    DeviceOption,
    GivenDecoderOption,
    JsonOption,
    RootOption,
    refuse_given,
)
from ivdr_deploy.errors import ConfigError


def bench(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="A bundle.", show_default=False)
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Instead of a bundle: put load on a server, at the address that `ivdr serve` prints.",
        ),
    ] = None,
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
        typer.Option(
            help="Timed passes over the videos; with --speeds turns of each variant, 6 at least.",
            show_default="3, or 9",
        ),
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
    decoder: GivenDecoderOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each; one for a core when left out.")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="With --endpoint: requests a second, at random times; may be repeated. Left out, the highest that "
            "--p99-ms allows is looked for."
        ),
    ] = None,
    p99_ms: Annotated[
        float | None,
        typer.Option(help="With --endpoint: what the 99th percentile must not exceed.", show_default="1000"),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            help="With --endpoint: clients that each wait for their answer, before the rates.",
            show_default="1",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="With --endpoint: how long each load is put on.", show_default="10"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Report file.", show_default="build/bench/NAME-VARIANT.json"),
    ] = None,
    root: RootOption = None,
    allow_container: AllowContainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time decoding, preprocessing and the network per video, and one variant against another on the same clips.

    Outputs are compared before anything is timed. Exit code 1 says that some videos could not be used,
    or that a folder of the list could not be read.

    With --speeds the variants are timed alone, and what is measured decides which one runs by default on machines of
    this kind.

    With --endpoint a server is measured: with clients that wait for their answers, then at rates that do not, where a
    latency begins when its request was due. The load generator's own limit is measured first. Exit code 1 says that no
    rate holds the bound, that at a --rate nothing was answered, or that a folder of the list could not be read.
    """
    if (artifact is None) == (endpoint is None):
        raise ConfigError("one thing is measured: a BUNDLE, or a server with --endpoint URL")
    if endpoint is not None:
        from ivdr_deploy.cli._bench_endpoint import bench_endpoint

        refuse_given(
            "is for a bundle",
            hint="a server has chosen already, and decodes by itself",
            speeds=speeds,
            variant=variant,
            against=against,
            device=device,
            decoder=decoder,
            threads=threads,
            rounds=rounds,
            allow_container=allow_container,
        )
        bench_endpoint(
            endpoint,
            videos,
            root=root,
            rates=rate or (),
            p99_ms=1000.0 if p99_ms is None else p99_ms,
            clients=1 if clients is None else clients,
            seconds=10.0 if seconds is None else seconds,
            out=out,
            as_json=as_json,
        )
        return
    assert artifact is not None
    from ivdr_deploy.cli._bench_bundle import bench_speeds, bench_videos

    refuse_given(
        "is for a server",
        hint="name one with --endpoint URL",
        rate=rate,
        p99_ms=p99_ms,
        clients=clients,
        seconds=seconds,
    )
    if speeds:
        refuse_given(
            "does not go with --speeds, which times on the golden clips, against the reference",
            videos=videos,
            against=against,
            decoder=decoder,
            root=root,
            allow_container=allow_container,
        )
        bench_speeds(artifact, variant or (), rounds, device, threads, out, as_json=as_json)
        return
    if len(set(variant or ())) > 1:
        raise ConfigError(
            "one --variant is timed on videos", hint="several are for --speeds; see also --against"
        )
    bench_videos(
        artifact,
        videos,
        variant=variant[0] if variant else None,
        against=against,
        device=device,
        decoder=decoder or "pyav",
        threads=threads,
        rounds=rounds,
        containers=allow_container,
        root=root,
        out=out,
        as_json=as_json,
    )
