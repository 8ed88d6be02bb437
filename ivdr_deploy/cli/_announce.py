"""What ``ivdr serve`` says when its server is ready."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivdr_deploy._console import print_json, print_text

if TYPE_CHECKING:
    from ivdr_deploy.serving.client import EndpointClient
    from ivdr_deploy.serving.http.deployment import Deployment


def announce_http(running: Deployment, *, as_json: bool) -> None:
    """Say that the HTTP server is ready: where it is, who is answered, and how to ask."""
    source = running.token_source
    asked = f"who asks must show the token in {source}" if source else "all are answered"
    print_text(f"run folder {running.folder.path}; {asked}")
    if running.moved:
        print_text(f"an update is why {running.current.bundle} is served; `ivdr serve --rollback` goes back")
    facts = {**running.current.facts, "run_dir": str(running.folder.path)}
    if running.grpc_address is not None:
        facts["grpc_address"] = running.grpc_address
    credentials = ""
    if source:
        shown = f"$(cat {shlex.quote(source)})" if Path(source).is_file() else "$IVDR_TOKEN"
        credentials = f'-H "Authorization: Bearer {shown}" '
    announce(running.client, facts, logs="standard error", as_json=as_json, credentials=credentials)


def announce(
    client: EndpointClient, facts: dict[str, Any], *, logs: str, as_json: bool, credentials: str = ""
) -> None:
    """Say that a server is ready, to people on stderr, and to machines as JSON on stdout where that is asked for."""
    if as_json:
        addresses = {"management_url": client.management_url, "metrics_url": client.metrics_url}
        print_json({"url": client.predict_url, **addresses, **facts})
    for line in (
        f"READY: {facts['name']} {facts['version']}, {facts['variant']} on {facts['runtime']}; {_proof(facts)}",
        f"try:     curl {credentials}-T video.mp4 {client.predict_url}",
        *([f"gRPC:    {facts['grpc_address']}"] if "grpc_address" in facts else []),
        f"metrics: {client.metrics_url}/metrics",
        f"logs:    {logs}",
        "stop it with Ctrl-C",
    ):
        print_text(line)


def _proof(facts: dict[str, Any]) -> str:
    """Say what the worker replayed when it loaded the model."""
    clips, videos = facts["golden_max_abs_diff"].values(), facts["decode_mean_diff"].values()
    said = [f"golden clips agree (largest difference {max(clips):.1e})"] if clips else []
    said += [f"golden videos agree (largest difference {max(videos):.1f} of 255)"] if videos else []
    return ", ".join(said) or "the bundle holds no golden clips and no golden videos"
