"""What the endpoint counts about itself, each metric defined once; a server passes it on in its own way."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One thing that is counted."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: Literal["count", "seconds"]
    help: str
    label: str = ""
    """Name of its label; empty: it has none."""

    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds, rising; one without a bound follows the last."""


REQUESTS = Metric(
    name="ivdr_requests_total",
    kind="counter",
    unit="count",
    help="requests answered, by `ok`, the code of the error, or `client_gone` in the middle of a stream",
    label="outcome",
)
CLIPS = Metric(
    name="ivdr_clips_total", kind="counter", unit="count", help="clips of the requests answered `ok`"
)
DECODE_SECONDS = Metric(
    name="ivdr_decode_seconds",
    kind="histogram",
    unit="seconds",
    help="opening and decoding, per request answered `ok`",
    buckets=_SECONDS,
)
PREPROCESS_SECONDS = Metric(
    name="ivdr_preprocess_seconds",
    kind="histogram",
    unit="seconds",
    help="resizing and cropping, per request answered `ok`",
    buckets=_SECONDS,
)
INFER_SECONDS = Metric(
    name="ivdr_infer_seconds",
    kind="histogram",
    unit="seconds",
    help="the request's share of the network calls it was in, per request answered `ok`",
    buckets=_SECONDS,
)
BATCH_CLIPS = Metric(
    name="ivdr_batch_clips",
    kind="histogram",
    unit="count",
    help="clips in one call of the network that ended well",
    buckets=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
)
BUSY = Metric(name="ivdr_busy", kind="gauge", unit="count", help="requests that are being answered")

METRICS = (REQUESTS, CLIPS, DECODE_SECONDS, PREPROCESS_SECONDS, INFER_SECONDS, BATCH_CLIPS, BUSY)


@dataclass(frozen=True, slots=True)
class Series:
    """One line of an exposition: a counter, a gauge, or one of the counters that a histogram consists of."""

    name: str
    metric: Metric
    labels: tuple[tuple[str, str], ...] = ()


class Metrics:
    """The values of all metrics since the service was opened. Safe to use from many threads.

    Args:
        on_observe: Called with every value of a histogram, for a server that puts them into buckets by itself.
    """

    def __init__(self, on_observe: Callable[[Metric, float], None] | None = None) -> None:
        self._on_observe = on_observe
        self._lock = threading.Lock()
        self._values: dict[tuple[Metric, str], float] = {}
        self._observed: dict[Metric, list[int]] = {}

    def add(self, metric: Metric, amount: float = 1.0, *, label: str = "") -> None:
        """Raise a counter, or move a gauge.

        Args:
            metric: One of ``METRICS``.
            amount: By how much; a counter never falls.
            label: Value of its label, where it has one.
        """
        with self._lock:
            self._values[metric, label] = self._values.get((metric, label), 0.0) + amount

    def observe(self, metric: Metric, value: float) -> None:
        """Put one value into a histogram."""
        with self._lock:
            counts = self._observed.setdefault(metric, [0] * (len(metric.buckets) + 1))
            counts[bisect_left(metric.buckets, value)] += 1
            self._values[metric, ""] = self._values.get((metric, ""), 0.0) + value
        if self._on_observe is not None:
            self._on_observe(metric, value)

    def values(self) -> dict[Series, float]:
        """Return the value of every series that was counted, histograms as Prometheus names them.

        The buckets of a histogram are cumulative: ``NAME_bucket{le="0.1"}`` counts every value up to 0.1.
        """
        with self._lock:
            values, observed = (
                dict(self._values),
                {name: list(counts) for name, counts in self._observed.items()},
            )
        found: dict[Series, float] = {}
        for (metric, label), value in values.items():
            if metric.kind == "histogram":
                found |= dict(_histogram(metric, value, observed[metric]))
            else:
                labels = ((metric.label, label),) if metric.label else ()
                found[Series(metric.name, metric, labels)] = value
        return found


def added(*values: Mapping[Series, float]) -> dict[Series, float]:
    """Add up what several services have counted."""
    found: dict[Series, float] = {}
    for each in values:
        for series, value in each.items():
            found[series] = found.get(series, 0.0) + value
    return found


def exposition(values: Mapping[Series, float], *, metrics: Sequence[Metric] = METRICS) -> str:
    """Write the series of some metrics in Prometheus' text format."""
    lines: list[str] = []
    for metric in metrics:
        own = {series: value for series, value in values.items() if series.metric == metric}
        if own:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for series, value in own.items():
            labels = ",".join(f'{name}="{text}"' for name, text in series.labels)
            lines.append(
                f"{series.name}{{{labels}}} {value:.17g}" if labels else f"{series.name} {value:.17g}"
            )
    return "\n".join([*lines, ""])


def _histogram(metric: Metric, total: float, counts: list[int]) -> Iterator[tuple[Series, float]]:
    count = 0
    for bound, inside in zip((*(f"{bound:g}" for bound in metric.buckets), "+Inf"), counts, strict=True):
        count += inside
        yield Series(f"{metric.name}_bucket", metric, (("le", bound),)), float(count)
    yield Series(f"{metric.name}_sum", metric), total
    yield Series(f"{metric.name}_count", metric), float(count)
