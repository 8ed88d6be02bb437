"""The parts of ``make bench-serving`` that measure speed: latency, batching, overlap. Each returns named figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from examples.serving import stand_in
from examples.serving.accelerator import Cost
from examples.serving.material import make_video
from examples.serving.servers import Served, ServerName, serving
from ivdr_deploy.benchmarks.http_client import Address
from ivdr_deploy.benchmarks.load import LoadGenerator, Step
from ivdr_deploy.benchmarks.timing import percentile, time_ms
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import ServerError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

SIZES = {"280kb": 281 << 10, "2mb": int(2.3 * (1 << 20))}
"""Bytes of the videos, by the name in the figures."""

TURNS, MUTANTS, SOAK = 60, 5000, 20_000
"""How often a latency is measured, how many damaged files are sent, and how many requests a soak has."""

CLIENTS = 16
LIGHT = ServiceSettings(threads=1, device="cpu")
TOGETHER = EndpointSettings(batch_size=CLIENTS, max_batch_delay_ms=10, queue_size=4 * CLIENTS, service=LIGHT)
ALONE = EndpointSettings(batch_size=1, max_batch_delay_ms=1, queue_size=4 * CLIENTS, service=LIGHT)
_REST_SECONDS = 0.02
"""Between two timed requests: a lone request meets a machine at rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What all parts share."""

    bundle: Path
    scratch: Path
    turns: int = TURNS
    """Of a latency."""

    seconds: float = 6.0
    """For which a throughput is measured, each time."""

    mutants: int = MUTANTS
    soak: int = SOAK

    def place(self, *words: str) -> Path:
        """Name a new folder."""
        return self.scratch / "-".join([*words, str(time.monotonic_ns())])


def latency(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Measure what the way over HTTP adds to a lone request, beside a server whose service answers at once.

    ``echo_ms_*`` is that of the server without batching: what it costs whatever the service does. What is left of the
    extra is ``lone_request_delay_ms``: waiting for others, and the service's own part.
    """
    echoing = stand_in.variables(bench.place("site"), **{stand_in.ECHO: "1"})
    videos = {
        size: make_video(bench.scratch / f"{size}.mp4", num_bytes=num_bytes)
        for size, num_bytes in SIZES.items()
    }
    found: dict[str, Any] = {}
    model = open_model(bench.bundle, threads=LIGHT.threads, device="cpu")
    options = DecodeOptions(workers=LIGHT.decode_workers, memory_bytes=LIGHT.decode_memory_mib << 20)
    with (
        model.runtime,
        VideoPredictor(model, limits=ENDPOINT_LIMITS, decode=options) as predictor,
        serving(name, bench.bundle, bench.place(name, "real")) as real,
        serving(name, bench.bundle, bench.place(name, "echo"), settings=ALONE, environment=echoing) as echo,
    ):
        for size, video in videos.items():
            with closing(_connected(real)) as to_real, closing(_connected(echo)) as to_echo:
                ways: dict[str, Callable[[], Any]] = {
                    "in_process": partial(predictor.predict, video),
                    "http": partial(_post, to_real, real, video),
                    "echo": partial(_post, to_echo, echo, video),
                }
                ms = _in_turns(ways, bench.turns)
            middle = {way: percentile(values, 50) for way, values in ms.items()}
            found |= {
                f"in_process_ms_{size}": middle["in_process"],
                f"http_ms_{size}": middle["http"],
                f"extra_ms_{size}": middle["http"] - middle["in_process"],
                f"echo_ms_{size}": middle["echo"],
                f"bytes_{size}": len(video),
            }
    found["lone_request_delay_ms"] = found["extra_ms_280kb"] - found["echo_ms_280kb"]
    return found


def batching(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Compare 16 clients of an accelerator that takes what waits together with one that takes clip after clip."""
    video = make_video(bench.scratch / "small.mp4", num_frames=20, size=(96, 64))
    rates = {}
    for way, cost, settings in (
        ("together", Cost(), TOGETHER),
        ("alone", Cost(most_clips=1), ALONE),
    ):
        with _accelerated(name, bench, cost, settings) as served:
            rates[way] = _throughput(served, video, bench.seconds)
    return {
        "batching_gain": rates["together"] / rates["alone"],
        "batched_per_s": rates["together"],
        "unbatched_per_s": rates["alone"],
    }


def overlap(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Compare decoding and an accelerator at work together with the slower of the two alone, in turns."""
    large = make_video(bench.scratch / "large.mp4", num_frames=60, size=(320, 240))
    small = make_video(bench.scratch / "small.mp4", num_frames=20, size=(96, 64))
    rates: dict[str, list[float]] = {"decode": [], "engine": [], "both": []}
    with (
        _accelerated(name, bench, Cost(), TOGETHER) as real,
        _accelerated(name, bench, Cost(call_ms=0.0, clip_ms=0.0), TOGETHER) as idle,
    ):
        for _ in range(6):
            for part, served, video in (
                ("decode", idle, large),
                ("engine", real, small),
                ("both", real, large),
            ):
                rates[part].append(_throughput(served, video, bench.seconds / 2))
    middle = {part: percentile(values, 50) for part, values in rates.items()}
    return {
        "overlap_efficiency": middle["both"] / min(middle["decode"], middle["engine"]),
        **{f"overlap_{part}_per_s": value for part, value in middle.items()},
    }


def _accelerated(
    name: ServerName, bench: Bench, cost: Cost, settings: EndpointSettings
) -> AbstractContextManager[Served]:
    site = stand_in.variables(bench.place("site"), **cost.variables())
    return serving(name, bench.bundle, bench.place(name), settings=settings, environment=site)


def _throughput(served: Served, video: bytes, seconds: float) -> float:
    """Return the answers a second that 16 clients get."""
    address = Address.of(served.client.predict_url)
    generator = LoadGenerator(address, [address.request(video, content_type="video/mp4")])
    generator.closed_loop(CLIENTS, seconds / 4)  # warm
    step = generator.closed_loop(CLIENTS, seconds)
    require_answered(step)
    return len(step.ok) / step.seconds


def require_answered(step: Step) -> None:
    """Refuse a figure that was made from refusals.

    Raises:
        ServerError: if anything was answered otherwise than with a 2xx.
    """
    if len(step.ok) < len(step.samples):
        raise ServerError(f"not every request was answered: {step.outcomes}")


def _in_turns(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Time each way once a turn, in an order that moves on; the first turns are not kept."""
    ms: dict[str, list[float]] = {way: [] for way in ways}
    names, warm = list(ways), max(3, turns // 6)
    for turn in range(warm + turns):
        first = turn % len(names)
        for way in names[first:] + names[:first]:
            taken = time_ms(ways[way])[1]
            if turn >= warm:
                ms[way].append(taken)
            time.sleep(_REST_SECONDS)
    return ms


def _connected(served: Served) -> HTTPConnection:
    return HTTPConnection(urlsplit(served.client.inference_url).netloc, timeout=60)


def _post(connection: HTTPConnection, served: Served, video: bytes) -> None:
    path = urlsplit(served.client.predict_url).path
    connection.request("POST", path, body=video, headers={"Content-Type": "application/octet-stream"})
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise ServerError(f"{served.name} answered {answer.status}")
