"""What was measured of an endpoint -> named figures, as JSON for machines and a table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from ivdr_deploy._text import one_line
from ivdr_deploy.benchmarks.endpoint import EndpointSamples
from ivdr_deploy.benchmarks.load import SEED, STAGES, Step
from ivdr_deploy.benchmarks.timing import percentile, summarise
from ivdr_deploy.environment import environment_facts

_PERCENTS = (50, 95, 99)


def endpoint_report(samples: EndpointSamples, *, seconds: float, p99_ms: float) -> dict[str, Any]:
    """Turn what was measured into a table of named figures, plus ``environment``.

    ``closed_*`` are those of the closed loop, ``own_*`` those of the generator against a server that answers at once,
    and ``steps`` has the figures of each open loop. ``holds_requests_per_s`` is the highest rate of the sweep at which
    99 % of all requests were answered with a 2xx within ``bound_ms``. ``ms_p50`` and its like are over the answers with
    a 2xx; what else there was is counted in ``outcomes``.

    Args:
        samples: What was measured.
        seconds: For which each load was put on.
        p99_ms: The bound of the sweep.
    """
    figures: dict[str, Any] = {
        "endpoint": samples.url,
        "videos": samples.videos,
        "mean_bytes": samples.mean_bytes,
        "arrivals": f"Poisson, seed {SEED}",
        "seconds_per_step": seconds,
        "percentile_method": "nearest rank",
        "own_requests_per_s": samples.own.requests_per_s,
    }
    figures |= {f"own_{name}": value for name, value in _latency(samples.own.alone).items()}
    figures |= {f"closed_{name}": value for name, value in step_figures(samples.closed).items()}
    if (found := samples.sweep) is not None:
        figures |= {
            "bound_ms": p99_ms,
            "holds_requests_per_s": found.holds.rate if found.holds else None,
            "holds_ms_p99": found.holds.latency_ms(99) if found.holds else None,
            "breaks_requests_per_s": found.breaks.rate if found.breaks else None,
            "limited_by": "the endpoint" if found.breaks else "the load generator",
        }
    figures["steps"] = [step_figures(step) for step in samples.steps]
    return {**figures, "environment": environment_facts()}


def step_figures(step: Step) -> dict[str, Any]:
    """Return the figures of one load.

    ``wait_ms_*`` is what is left of a latency when the stages that the server measured are taken away: the way there
    and back, and waiting.
    """
    figures: dict[str, Any] = {
        "rate": step.rate,
        "clients": step.clients,
        "requests": len(step.samples),
        "outcomes": step.outcomes,
        "resent": step.resent,
        "answered_per_s": len(step.ok) / step.seconds,
        **_latency(step),
    }
    overall = step.latency_ms(99)
    figures["all_ms_p99"] = overall if math.isfinite(overall) else None
    if step.rate is not None:
        figures["lag_ms_p99"] = percentile([sample.lag_ms for sample in step.samples], 99)
    told = [sample for sample in step.ok if sample.stages]
    if told:
        stages = {stage: [sample.stages[stage] for sample in told] for stage in STAGES}
        stages["wait_ms"] = [sample.latency_ms - sum(sample.stages.values()) for sample in told]
        figures |= {
            f"{stage}_p{percent}": percentile(values, percent)
            for stage, values in stages.items()
            for percent in (50, 99)
        }
    return figures


def render_endpoint(report: Mapping[str, Any]) -> Table:
    """Lay a report out for people."""
    facts = report["environment"]
    table = Table(
        title=Text(
            f"{one_line(report['endpoint'])}: {report['videos']} videos of {report['mean_bytes'] / 1024:.0f} KiB, "
            f"{report['seconds_per_step']:g} s each"
        ),
        caption=f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']}; nearest rank; the generator "
        f"itself: {report['own_requests_per_s']:.0f} requests/s, p50 {report['own_ms_p50']:.1f} ms",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("load", no_wrap=True)
    for name in ("answered/s", *(f"p{percent} ms" for percent in _PERCENTS), "waiting p50", "not 2xx"):
        table.add_column(name, justify="right")
    closed = {
        name.removeprefix("closed_"): value for name, value in report.items() if name.startswith("closed_")
    }
    clients = closed["clients"]
    table.add_row(f"{clients} client{'s' * (clients != 1)}", *_cells(closed), end_section=True)
    for step in sorted(report["steps"], key=lambda step: float(step["rate"])):
        table.add_row(f"{step['rate']:.3g}/s", *_cells(step))
    return table


def verdict(report: Mapping[str, Any]) -> str:
    """Say in a line what a sweep found, or which load got no answer; empty where there is nothing to say."""
    if "bound_ms" not in report:
        silent = [step["rate"] for step in report["steps"] if step["ms_p50"] is None]
        said = ", ".join(f"{rate:.3g} requests/s" for rate in silent)
        return f"FAIL: no request was answered with a 2xx at {said}" if silent else ""
    bound, rate = f"p99 <= {report['bound_ms']:g} ms", report["holds_requests_per_s"]
    if rate is None:
        return f"does not hold {bound} at any rate that was tried"
    more = "" if report["breaks_requests_per_s"] else " or more: the load generator was at its limit"
    return f"holds {rate:.3g} requests/s{more} at {bound} (p99 {report['holds_ms_p99']:.0f} ms)"


def _latency(step: Step) -> dict[str, float | None]:
    if not step.ok:
        return {"ms_mean": None, **{f"ms_p{percent}": None for percent in _PERCENTS}}
    return {
        f"ms_{name}": value for name, value in asdict(summarise([one.latency_ms for one in step.ok])).items()
    }


def _cells(step: Mapping[str, Any]) -> list[str]:
    values = [
        step["answered_per_s"],
        *(step[f"ms_p{percent}"] for percent in _PERCENTS),
        step.get("wait_ms_p50"),
    ]
    other = {name: count for name, count in step["outcomes"].items() if not name.startswith("2")}
    said = ", ".join(f"{name}: {count}" for name, count in other.items())
    return [*("-" if value is None else f"{value:.1f}" for value in values), said or "0"]
