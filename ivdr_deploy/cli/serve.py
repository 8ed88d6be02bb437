"""``ivdr serve``: the real TorchServe with one archive, until Ctrl-C."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivdr_deploy._console import console, done, print_json

if TYPE_CHECKING:
    from ivdr_deploy.serving.torchserve.process import TorchServeProcess


def serve(
    source: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="What `ivdr archive` wrote (.mar), or a bundle.")
    ],
    port: Annotated[
        int, typer.Option(help="First of five ports in a row: inference, management, metrics, gRPC twice.")
    ] = 8080,
    run_dir: Annotated[
        Path, typer.Option(help="Folder for the server's settings, logs and temporary files.")
    ] = Path("runs/serve"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the addresses as JSON when it is ready.")
    ] = False,
) -> None:
    """Run TorchServe on this machine until Ctrl-C; READY means that golden clips and videos agree."""
    from ivdr_deploy.serving.torchserve import process as servers
    from ivdr_deploy.serving.torchserve.config import Ports

    server = servers.serve(source, run_dir=run_dir, ports=Ports.starting_at(port))
    console.print(f"the same by hand:\n{server.command_line}\n", style="dim", markup=False)
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        with console.status("starting TorchServe"):
            server.start()
        with suppress(
            KeyboardInterrupt
        ):  # from the first word of being ready on, an interruption is the way to stop
            _announce(server, as_json=as_json)
            server.watch()
        with suppress(OSError):  # the terminal is gone
            console.print("stopping: requests that wait or run are answered first")
    finally:
        _interrupt_no_more()
        server.stop()
    done(f"stopped: nothing of {server.client.model} is left running")


def _announce(server: TorchServeProcess, *, as_json: bool) -> None:
    facts, client = server.worker_facts, server.client
    if as_json:
        addresses = {"management_url": client.management_url, "metrics_url": client.metrics_url}
        print_json({"url": server.url, **addresses, **facts})
    console.print(
        f"READY: {facts['name']} {facts['version']}, {facts['variant']} on {facts['runtime']}; {_proof(facts)}\n"
        f"try:     curl -T video.mp4 {server.url}\n"
        f"metrics: {client.metrics_url}/metrics\n"
        f"logs:    {server.config.logs}\n"
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt once: a shell or ``timeout`` may send the signal twice, and a person may press Ctrl-C again."""
    _interrupt_no_more()
    raise KeyboardInterrupt


def _interrupt_no_more() -> None:
    """Let the server be stopped in peace: stopping has deadlines of its own, and leaves nothing half done."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
