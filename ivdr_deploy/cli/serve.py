"""``ivdr serve``: a server with one model, until Ctrl-C."""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ivdr_deploy._console import console, done, print_json
from ivdr_deploy.errors import ConfigError

if TYPE_CHECKING:
    from ivdr_deploy.serving.client import EndpointClient

ServerChoice = Literal["torchserve", "http"]


def serve(
    source: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="What `ivdr archive` wrote (.mar), or a bundle.")
    ],
    server: Annotated[
        ServerChoice, typer.Option(help="torchserve, or http: FastAPI on uvicorn, which takes a bundle.")
    ] = "torchserve",
    host: Annotated[
        str, typer.Option(help="Address of the inference port, with --server http.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            help="First of the ports in a row: inference, then management and metrics; TorchServe takes five."
        ),
    ] = 8080,
    config: Annotated[Path | None, typer.Option(metavar="TOML", help="Settings, with --server http.")] = None,
    run_dir: Annotated[
        Path, typer.Option(help="Folder for TorchServe's settings, logs and temporary files.")
    ] = Path("runs/serve"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the addresses as JSON when it is ready.")
    ] = False,
) -> None:
    """Run a server on this machine until Ctrl-C; READY means that golden clips and videos agree."""
    if server == "http":
        _serve_http(source, host=host, port=port, config=config, as_json=as_json)
        return
    if config is not None or host != "127.0.0.1":
        raise ConfigError(
            "--config and --host are for --server http",
            hint="settings of TorchServe are packed with the archive: `ivdr archive --config`",
        )
    from ivdr_deploy.serving.torchserve import process as servers
    from ivdr_deploy.serving.torchserve.config import Ports

    running = servers.serve(source, run_dir=run_dir, ports=Ports.starting_at(port))
    console.print(f"the same by hand:\n{running.command_line}\n", style="dim", markup=False)
    _interrupt_once()
    try:
        with console.status("starting TorchServe"):
            running.start()
        with suppress(
            KeyboardInterrupt
        ):  # from the first word of being ready on, an interruption is the way to stop
            _announce(running.client, running.worker_facts, logs=str(running.config.logs), as_json=as_json)
            running.watch()
        with suppress(OSError):  # the terminal is gone
            console.print("stopping: requests that wait or run are answered first")
    finally:
        _interrupt_no_more()
        running.stop()
    done(f"stopped: nothing of {running.client.model} is left running")


def _serve_http(source: Path, *, host: str, port: int, config: Path | None, as_json: bool) -> None:
    from ivdr_deploy._optional import require
    from ivdr_deploy.serving.core.settings import read_settings
    from ivdr_deploy.serving.http.settings import HttpSettings

    for package in ("fastapi", "uvicorn", "python_multipart"):
        require(package, extra="http")
    from ivdr_deploy.serving.http.server import HttpServer

    access = logging.getLogger("ivdr_deploy.access")
    access.addHandler(logging.StreamHandler())
    access.setLevel(logging.INFO)
    settings = HttpSettings() if config is None else read_settings(config, HttpSettings)
    with HttpServer(source, settings, host=host, port=port) as running:
        _interrupt_once()
        running.start()
        with suppress(KeyboardInterrupt):
            _announce(running.client, running.service.describe(), logs="standard error", as_json=as_json)
            running.wait()
        _interrupt_no_more()
        with suppress(OSError):  # the terminal is gone
            console.print("stopping: requests that wait or run are answered first")
        running.stop()
        running.wait()
    done(f"stopped: nothing of {running.client.model} is left running")


def _announce(client: EndpointClient, facts: dict[str, Any], *, logs: str, as_json: bool) -> None:
    if as_json:
        addresses = {"management_url": client.management_url, "metrics_url": client.metrics_url}
        print_json({"url": client.predict_url, **addresses, **facts})
    console.print(
        f"READY: {facts['name']} {facts['version']}, {facts['variant']} on {facts['runtime']}; {_proof(facts)}\n"
        f"try:     curl -T video.mp4 {client.predict_url}\n"
        f"metrics: {client.metrics_url}/metrics\n"
        f"logs:    {logs}\n"
        "stop it with Ctrl-C",
        markup=False,
    )


def _proof(facts: dict[str, Any]) -> str:
    """Say what the worker replayed when it loaded the model."""
    clips, videos = facts["golden_max_abs_diff"].values(), facts["decode_mean_diff"].values()
    said = [f"golden clips agree (largest difference {max(clips):.1e})"] if clips else []
    said += [f"golden videos agree (largest difference {max(videos):.1f} of 255)"] if videos else []
    return ", ".join(said) or "the bundle holds no golden clips and no golden videos"


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
