"""``ivdr serve``: a server with one model, until Ctrl-C."""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from ivdr_deploy._console import console, done, print_text
from ivdr_deploy.cli._announce import announce, announce_http
from ivdr_deploy.cli._options import VIDEOS_HELP, refuse_given
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import MAX_BATCH

ServerChoice = Literal["torchserve", "http"]
AuthChoice = Literal["token", "none"]


def serve(
    source: Annotated[
        Path | None, typer.Argument(metavar="ARCHIVE", help="What `ivdr archive` wrote (.mar), or a bundle.")
    ] = None,
    server: Annotated[
        ServerChoice | None,
        typer.Option(help="torchserve (by default), or http: FastAPI on uvicorn, which takes a bundle."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address of the inference port, with --server http; by default 127.0.0.1."),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            help="First of the ports in a row: inference, then management and metrics; TorchServe takes five."
        ),
    ] = 8080,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Also answer the Open Inference Protocol over gRPC here, with --server http."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes with the network, with --server http; by default as --config says, or 1."
        ),
    ] = None,
    batch_clips: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_BATCH,
            help=f"Most clips in a call of the network, with --server http; by default as --config says: {MAX_BATCH}.",
        ),
    ] = None,
    auth: Annotated[
        AuthChoice | None,
        typer.Option(
            help="Who is answered, with --server http: by default whoever has the token, on loopback all."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="TOML", help="Settings, with --server http.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the server: runs/serve, or runs/http-PORT with --server http."),
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Have the server that runs in --run-dir (or runs/http-PORT) compare this bundle with the one that it "
            "serves, on --videos, and change over to it.",
        ),
    ] = None,
    rollback: Annotated[
        bool,
        typer.Option("--rollback", help="Have that server change back to the bundle before the last update."),
    ] = False,
    videos: Annotated[
        Path | None, typer.Option("--videos", "--data", help=f"With --update: {VIDEOS_HELP}")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="With --update: share of videos, 0 to 1, that must get the label they get now; 0.9 by default.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the addresses, or the report of an update, as JSON.")
    ] = False,
) -> None:
    """Run a server on this machine until Ctrl-C; READY means that golden clips and videos agree.

    Exit code 1 of --update says that the two bundles do not agree, or that a folder of --videos could not be read, and
    that the old one goes on.
    """
    of_http: dict[str, Any] = {
        "host": host,
        "grpc_port": grpc_port,
        "workers": workers,
        "batch_clips": batch_clips,
        "auth": auth,
        "config": config,
    }
    if update is not None or rollback:
        from ivdr_deploy.cli._update import roll_back, update_server

        if source is not None or (update is not None and rollback):
            raise ConfigError("give one of ARCHIVE, --update BUNDLE and --rollback")
        refuse_given(
            "is for starting a server; the one that runs keeps what it was started with",
            server=None if server == "http" else server,
            **of_http,
        )
        folder = run_dir or _http_run_dir(port)
        if update is None:
            refuse_given("is for --update", videos=videos, min_agreement=min_agreement)
            roll_back(folder, as_json=as_json)
        else:
            update_server(folder, update, videos=videos, min_agreement=min_agreement, as_json=as_json)
        return
    refuse_given("is for --update", videos=videos, min_agreement=min_agreement)
    if source is None:
        raise ConfigError("nothing to serve is named", hint="ivdr serve ARCHIVE, or a bundle")
    if server == "http":
        _serve_http(
            source,
            **of_http,
            port=port,
            run_dir=run_dir,
            as_json=as_json,
        )
        return
    refuse_given(
        "is for --server http",
        hint="settings of TorchServe are packed with the archive: `ivdr archive --config`",
        **of_http,
    )
    from ivdr_deploy.serving.torchserve import process as servers
    from ivdr_deploy.serving.torchserve.config import Ports

    running = servers.serve(source, run_dir=run_dir or Path("runs/serve"), ports=Ports.starting_at(port))
    print_text("the same by hand:", style="dim")
    print_text(running.command_line, style="dim")
    _interrupt_once()
    try:
        with console.status("starting TorchServe"):
            running.start()
        with suppress(
            KeyboardInterrupt
        ):  # from the first word of being ready on, an interruption is the way to stop
            announce(running.client, running.worker_facts, logs=str(running.config.logs), as_json=as_json)
            running.watch()
        with suppress(OSError):  # the terminal is gone
            console.print("stopping: requests that wait or run are answered first")
    finally:
        _interrupt_no_more()
        running.stop()
    done(f"stopped: nothing of {running.client.model} is left running")


def _serve_http(
    source: Path,
    *,
    host: str | None,
    port: int,
    grpc_port: int | None,
    workers: int | None,
    batch_clips: int | None,
    auth: AuthChoice | None,
    config: Path | None,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    from ivdr_deploy._files import scratch_folder
    from ivdr_deploy._optional import require
    from ivdr_deploy.serving.core.settings import read_settings
    from ivdr_deploy.serving.http.settings import HttpSettings

    for package in ("fastapi", "uvicorn", "httptools", "python_multipart"):
        require(package, extra="http")
    from ivdr_deploy.serving.http.auth import is_loopback
    from ivdr_deploy.serving.http.deployment import Deployment

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    host = host or "127.0.0.1"
    settings = HttpSettings() if config is None else read_settings(config, HttpSettings)
    if workers is not None:
        settings = replace(settings, workers=workers)
    if batch_clips is not None:
        settings = replace(settings, service=replace(settings.service, batch_clips=batch_clips))
    asked = not is_loopback(host) if auth is None else auth == "token"
    with ExitStack() as opened:
        if run_dir is None and port == 0:  # no other command could find it by its port
            run_dir = opened.enter_context(scratch_folder("ivdr-http-"))
        running = opened.enter_context(
            Deployment(
                source,
                settings,
                host=host,
                port=port,
                run_dir=run_dir or _http_run_dir(port),
                auth=asked,
                grpc_port=grpc_port,
            )
        )
        _interrupt_once()
        with suppress(KeyboardInterrupt):
            announce_http(running, as_json=as_json)
            running.wait()
        _interrupt_no_more()
        with suppress(OSError):  # the terminal is gone
            console.print("stopping: requests that wait or run are answered first")
    done(f"stopped: nothing of {running.client.model} is left running")


def _http_run_dir(port: int) -> Path:
    return Path("runs") / f"http-{port}"


_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""SIGHUP: the terminal was closed. Not every system has it."""


def _interrupt_once() -> None:
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt once: a shell or ``timeout`` may send the signal twice, and a person may press Ctrl-C again."""
    _interrupt_no_more()
    raise KeyboardInterrupt


def _interrupt_no_more() -> None:
    """Let the server be stopped in peace: stopping has deadlines of its own, and leaves nothing half done."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
