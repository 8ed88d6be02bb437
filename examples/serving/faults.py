"""The parts of ``make bench-serving`` that do harm or last long: mutants, a killed worker, stopping, a soak."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.serving import stand_in
from examples.serving.accelerator import Cost
from examples.serving.material import CODECS, make_bundle, make_video
from examples.serving.mutants import mutants
from examples.serving.parts import LIGHT, TOGETHER, Bench, require_answered
from examples.serving.servers import IVDR, ServerName, serving, stop
from examples.serving.traffic import Errand, steady_traffic, wait_until
from ivdr_deploy.benchmarks.http_client import Address
from ivdr_deploy.benchmarks.load import LoadGenerator
from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

DOCUMENTED_5XX = frozenset({(503, "draining"), (504, "too_slow")})
"""Status and code that a damaged file may have as its answer."""

Memory = dict[int, tuple[str, int]]
"""Name and resident bytes of each process, by its id."""

_AT_A_TIME = 8
_GRACE_SECONDS = 0.05
"""A request that was sent so long before the signal had been accepted then."""


class NotMeasuredError(Exception):
    """This server has nothing that could be measured; says why."""


def odd_files() -> list[bytes]:
    """Return the awkward real files where ``IVDR_TEST_DATA`` names them."""
    folder = Path(os.environ.get("IVDR_TEST_DATA", "")) / "odd"
    if not os.environ.get("IVDR_TEST_DATA") or not folder.is_dir():
        return []
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".md"]


def mutated(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Send damaged videos, some hundred at first so that memory is warm; nothing but errors of theirs may happen."""
    originals = [
        make_video(bench.scratch / f"whole.{kind}", num_frames=40, size=(160, 120)) for kind in CODECS
    ]
    odd = odd_files()
    warm = max(50, bench.mutants // 10)
    settings = EndpointSettings(batch_size=4, queue_size=4 * _AT_A_TIME, service=LIGHT)
    with serving(name, bench.bundle, bench.place(name, "mutants"), settings=settings) as served:
        send_all(served.client, [*originals, *odd, *mutants(originals, warm, seed=1)])
        before, workers = served.memory(), served.workers()
        said = send_all(served.client, [*odd, *mutants(originals, bench.mutants)])
        whole = send_all(served.client, originals)
        after = served.memory()
        if set(whole) != {(200, "")}:
            raise ServerError(f"after the mutants the whole videos are answered {dict(whole)}")
        deaths = len(workers - served.workers())
    return {
        "mutants_sent": sum(said.values()),
        "mutants_odd_files": len(odd),
        "mutants_undocumented_5xx": undocumented_5xx(said),
        "mutants_without_answer": said[0, "none"],
        "mutants_answers": {
            f"{status} {code}".strip(): count for (status, code), count in sorted(said.items())
        },
        "worker_deaths": deaths,
        "decoder_deaths": said[422, "crashed"],
        "mutants_rss_growth_mb": (_total(after) - _total(before)) / 1e6,
        "mutants_processes": _by_process(before, after),
    }


def send_all(client: EndpointClient, videos: Iterable[bytes]) -> Counter[tuple[int, str]]:
    """Send videos, a few at a time; return how many there were of each status and code, 0 for no answer."""

    def send(video: bytes) -> tuple[int, str]:
        try:
            status, body = client.post(video, content_type="application/octet-stream")
        except ServerError:  # also one that does not come in time
            return 0, "none"
        return status, str(body.get("code", ""))

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return Counter(pool.map(send, videos))


def undocumented_5xx(said: Counter[tuple[int, str]]) -> int:
    """Count the answers that say that something is wrong with the server."""
    return sum(count for found, count in said.items() if found[0] >= 500 and found not in DOCUMENTED_5XX)


def killed_worker(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Kill one of two workers under load, clients sending again what fails, until it is back.

    Raises:
        ServerError: if the kill hit nothing, or the worker does not come back.
    """
    video = make_video(bench.scratch / "small.mp4", num_frames=20, size=(96, 64))
    settings = replace(TOGETHER, workers=2, batch_size=2)
    site = stand_in.variables(bench.place("site"), **Cost().variables())
    with serving(
        name, bench.bundle, bench.place(name, "kill"), settings=settings, environment=site
    ) as served:
        url, workers = served.client.predict_url, served.workers()
        with steady_traffic(url, video, clients=_AT_A_TIME, retry=True) as errands:
            wait_until(lambda: len(errands) > 10 * _AT_A_TIME)
            victim = min(workers)
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            back = wait_until(lambda: victim not in (held := served.workers()) and len(held) == len(workers))
            wait_until(lambda: time.monotonic() > killed + 2.0)
        if not back:
            raise ServerError("the worker was not replaced within two minutes")
    failed_once = [errand for errand in errands if len(errand.tries) > 1]
    if not any(one.ended >= killed for errand in failed_once for one in errand.tries[:-1]):
        raise ServerError("the kill hit no request")
    return {
        "kill_worker_requests": len(errands),
        "kill_worker_failed_once": len(failed_once),
        "kill_worker_statuses": _statuses(failed_once),
        "kill_worker_lost_after_retries": sum(not errand.answered for errand in errands),
        "kill_worker_gap_seconds": _longest_gap(errands, since=killed),
    }


def updated(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Change to another version and back under steady load.

    Raises:
        NotMeasuredError: where the server cannot.
        ServerError: if it does not change over, or nobody saw both versions.
    """
    if name == "torchserve":
        raise NotMeasuredError("`ivdr serve --update` is for --server http")
    video = make_video(bench.scratch / "small.mp4", num_frames=20, size=(96, 64))
    listed = bench.scratch / "update.txt"
    listed.write_text("small.mp4\n")
    newer = bench.scratch / "newer"
    if not newer.exists():
        make_bundle(newer, version="2.0")
    with serving(name, bench.bundle, bench.place(name, "update")) as served:
        order = (*IVDR, "serve", "--run-dir", str(served.run_dir))
        with steady_traffic(served.client.predict_url, video, clients=4, retry=False) as errands:
            wait_until(lambda: len(errands) > 20)
            for change in (("--update", str(newer), "--videos", str(listed)), ("--rollback",)):
                done = subprocess.run([*order, *change], capture_output=True, text=True)
                if done.returncode:
                    raise ServerError(f"{change[0]} ended with {done.returncode}: {done.stderr[-300:]}")
                count = len(errands)
                wait_until(lambda count=count: len(errands) > count + 20)  # type: ignore[misc]
    versions = Counter(errand.tries[-1].version for errand in errands if errand.answered)
    if len(versions) != 2:
        raise ServerError(f"two versions were expected in the answers, found {dict(versions)}")
    return {
        "update_requests": len(errands),
        "update_failed_requests": sum(not errand.answered for errand in errands),
        "update_statuses": _statuses(errands),
        "update_answers_by_version": dict(versions),
    }


def drained(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Stop the server by SIGTERM under steady load of requests that take a third of a second.

    Raises:
        ServerError: if nothing was under way.
    """
    video = make_video(bench.scratch / "small.mp4", num_frames=20, size=(96, 64))
    site = stand_in.variables(bench.place("site"), **Cost(call_ms=300.0).variables())
    with serving(name, bench.bundle, bench.place(name, "drain"), environment=site) as served:
        url = served.client.predict_url
        with steady_traffic(url, video, clients=4, retry=False, until_refused=True) as errands:
            wait_until(lambda: len(errands) >= 8)
            stopped = time.monotonic()
            code = stop(served.process)
    tries = [errand.tries[0] for errand in errands]
    under_way = [
        one for one in tries if one.sent is not None and one.sent < stopped - _GRACE_SECONDS < one.ended
    ]
    later = [one for one in tries if one.sent is not None and one.sent >= stopped - _GRACE_SECONDS]
    if not under_way:
        raise ServerError("nothing was under way when the server was stopped")
    return {
        "drain_under_way": len(under_way),
        "drain_accepted_lost": sum(one.status != 200 for one in under_way),
        "drain_sent_later": dict(Counter(str(one.status) for one in later)),
        "drain_exit_code": code,
    }


def soaked(name: ServerName, bench: Bench) -> dict[str, Any]:
    """Send many small videos; look at the memory of each process after a tenth of them, half way and at the end.

    What only warms up grows in the first half and not in the second.
    """
    originals = [
        make_video(bench.scratch / f"whole.{kind}", num_frames=40, size=(160, 120)) for kind in CODECS
    ]
    settings = EndpointSettings(batch_size=4, queue_size=4 * _AT_A_TIME, service=LIGHT)
    with serving(name, bench.bundle, bench.place(name, "soak"), settings=settings) as served:
        address = Address.of(served.client.predict_url)
        requests = [address.request(video, content_type="video/mp4") for video in originals]
        generator = LoadGenerator(address, requests)
        warm = generator.closed_loop(_AT_A_TIME, 3600.0, most=bench.soak // 10)
        before = served.memory()
        half = (bench.soak - bench.soak // 10) // 2
        first = generator.closed_loop(_AT_A_TIME, 3600.0, most=half)
        middle = served.memory()
        step = generator.closed_loop(_AT_A_TIME, 3600.0, most=half)
        after = served.memory()
    for one in (warm, first, step):
        require_answered(one)
    by_process, second_half = _by_process(before, after), _by_process(middle, after)
    return {
        "soak_requests": len(warm.samples) + len(first.samples) + len(step.samples),
        "soak_rss_growth": max(one["growth"] for one in by_process.values()),
        "soak_rss_growth_second_half": max(one["growth"] for one in second_half.values()),
        "soak_processes": by_process,
        "soak_processes_gone": len(set(before) - set(after)),
        "soak_per_s": len(step.ok) / step.seconds,
    }


def _by_process(before: Memory, after: Memory) -> dict[str, dict[str, float]]:
    """Return the resident memory of each process that was there at both times."""
    return {
        f"{kind} {place}": {
            "before_mb": size / 1e6,
            "after_mb": after[pid][1] / 1e6,
            "growth": after[pid][1] / size - 1,
        }
        for place, (pid, (kind, size)) in enumerate(before.items())
        if pid in after
    }


def _total(memory: Memory) -> int:
    return sum(size for _, size in memory.values())


def _statuses(errands: Iterable[Errand]) -> dict[str, int]:
    return dict(Counter(str(one.status) for errand in errands for one in errand.tries if one.status != 200))


def _longest_gap(errands: Iterable[Errand], *, since: float) -> float:
    """Return the longest time without a good answer after a moment.

    Raises:
        ServerError: if there was none at all.
    """
    ends = sorted(errand.tries[-1].ended for errand in errands if errand.answered)
    times = [since, *(end for end in ends if end > since)]
    if len(times) == 1:
        raise ServerError("nothing was answered any more")
    return max(later - earlier for earlier, later in itertools.pairwise(times))
