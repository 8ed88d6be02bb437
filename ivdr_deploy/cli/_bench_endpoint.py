"""``ivdr bench --endpoint URL``: what a server holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import typer

from ivdr_deploy._console import console, done, print_json
from ivdr_deploy._files import try_beside
from ivdr_deploy._text import as_file_name
from ivdr_deploy.cli._options import any_unread, read_list
from ivdr_deploy.errors import ConfigError

_MOST_BYTES = 2 << 30
"""Of all videos together: a disk that is read meanwhile would be measured too."""

_MOST_REQUESTS = 1_000_000
"""Of a load: when each is due is drawn before the first is sent, and every one is kept until the last is answered."""

_LEAST_SECONDS, _MOST_SECONDS = 0.1, 3600.0
_MOST_P99_MS = 60_000.0
"""As long as a request is waited for. A load of a sweep lasts twenty times as long."""


def bench_endpoint(
    url: str,
    videos: Path | None,
    *,
    root: Path | None,
    rates: Sequence[float],
    p99_ms: float,
    clients: int,
    seconds: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Put load on a server; see ``bench``."""
    from ivdr_deploy.benchmarks.endpoint import measure_endpoint
    from ivdr_deploy.benchmarks.endpoint_report import endpoint_report, render_endpoint, verdict
    from ivdr_deploy.benchmarks.http_client import Address
    from ivdr_deploy.benchmarks.report import write_report

    Address.of(url)  # refused before the videos are read
    if videos is None:
        raise ConfigError("there are no videos to send", hint="give them with --videos")
    _check_load(rates, p99_ms=p99_ms, clients=clients, seconds=seconds)
    listed = read_list(videos, root=root)
    listed.require_files()
    if (size := sum(item.path.stat().st_size for item in listed.items)) > _MOST_BYTES:
        raise ConfigError(
            f"the videos have {size >> 20} MiB together, and at most {_MOST_BYTES >> 20} are held in memory",
            hint="give a shorter list: they are sent again and again",
        )
    name = urlsplit(url).path.rpartition("/")[2] or "endpoint"
    path = out or Path("build/bench") / f"{as_file_name(name)}-endpoint.json"
    try_beside(path)  # before the minutes of work that could not be kept
    bodies = [item.path.read_bytes() for item in listed.items]
    token = os.environ.get("IVDR_TOKEN", "")
    with console.status("measuring") as status:
        samples = measure_endpoint(
            url,
            bodies,
            rates=rates,
            clients=clients,
            seconds=seconds,
            p99_ms=p99_ms,
            token=token,
            tell=status.update,
        )
    report = endpoint_report(samples, seconds=seconds, p99_ms=p99_ms)
    if as_json:
        print_json(report)
    else:
        console.print(render_endpoint(report))
    write_report(report, path)  # when it is printed: a figure that took minutes is never lost
    if not as_json:
        found = verdict(report)
        done(f"{found}; benchmark -> {path}" if found else f"benchmark -> {path}")
    failed = (
        not all(step.ok for step in samples.steps) if samples.sweep is None else samples.sweep.holds is None
    )
    if failed or any_unread(listed.left_out):
        raise typer.Exit(1)


def _check_load(rates: Sequence[float], *, p99_ms: float, clients: int, seconds: float) -> None:
    """Refuse loads that would never end, or fill the memory. NaN lies in no range."""
    from ivdr_deploy.benchmarks.http_client import MOST_CONNECTIONS

    if not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
        raise ConfigError(
            f"--seconds must be from {_LEAST_SECONDS:g} to {_MOST_SECONDS:g}, found {seconds:g}"
        )
    if not 0 <= p99_ms <= _MOST_P99_MS:
        raise ConfigError(f"--p99-ms must be from 0 to {_MOST_P99_MS:g}, found {p99_ms:g}")
    if not 1 <= clients <= MOST_CONNECTIONS:
        raise ConfigError(
            f"--clients must be from 1 to {MOST_CONNECTIONS}, the connections that are open at a time, found {clients}"
        )
    if wrong := [rate for rate in rates if not 1 <= rate * seconds <= _MOST_REQUESTS]:
        raise ConfigError(
            f"--rate {wrong[0]:g} for {seconds:g} s is {wrong[0] * seconds:g} requests; expected 1 to {_MOST_REQUESTS}",
            hint="--rate is in requests a second: give another one, or other --seconds",
        )
