"""Clocks, percentiles and paired comparisons: the arithmetic of a benchmark, without a benchmark in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ivdr_deploy.errors import ConfigError

T = TypeVar("T")
Clock = Callable[[], float]
"""Returns seconds from an arbitrary start, never going back."""


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return a percentile by the nearest rank.

    That is the smallest sample that at least ``percent`` % of all samples do not exceed: a value that was
    really measured. With fewer than 100 samples the 99th percentile is therefore the worst of them.

    Raises:
        ConfigError: if there are no samples, or ``percent`` is outside (0, 100].
    """
    if not samples or not 0 < percent <= 100:
        raise ConfigError(
            f"a percentile needs samples and 0 < percent <= 100; found {len(samples)} and {percent}"
        )
    return sorted(samples)[math.ceil(len(samples) * percent / 100) - 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a list of durations is reported as; milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float


def summarise(samples_ms: Sequence[float]) -> Summary:
    """Summarise durations; ``ConfigError`` if there are none."""
    p50, p95, p99 = (percentile(samples_ms, percent) for percent in (50, 95, 99))
    return Summary(mean=math.fsum(samples_ms) / len(samples_ms), p50=p50, p95=p95, p99=p99)


def time_ms(call: Callable[[], T], *, clock: Clock = time.perf_counter) -> tuple[T, float]:
    """Call once; return the result and the milliseconds it took."""
    start = clock()
    result = call()
    return result, (clock() - start) * 1000.0


def time_pair(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    swap: bool,
    clock: Clock = time.perf_counter,
) -> tuple[float, float]:
    """Time two ways of doing the same work, one right after the other, so that both meet the same machine.

    Args:
        first: One way.
        second: The other.
        swap: Run ``second`` before ``first``. Swap every other pair: whoever runs second finds warmer caches.
        clock: The clock.

    Returns:
        Milliseconds of ``first`` and of ``second``, in this order however they were run.
    """
    if swap:
        (_, second_ms), (_, first_ms) = time_ms(second, clock=clock), time_ms(first, clock=clock)
    else:
        (_, first_ms), (_, second_ms) = time_ms(first, clock=clock), time_ms(second, clock=clock)
    return first_ms, second_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """How many times faster one way is, over pairs timed together."""

    median: float
    p25: float
    p75: float
    low: float
    high: float
    pairs: int


def speedup(faster_ms: Sequence[float], slower_ms: Sequence[float]) -> Speedup:
    """Compare pairs: each ratio is ``slower / faster`` of one pair, so a drift of the machine cancels out.

    Raises:
        ConfigError: if there are no pairs.
    """
    ratios = [slower / faster for faster, slower in zip(faster_ms, slower_ms, strict=True)]
    p25, median, p75 = (percentile(ratios, percent) for percent in (25, 50, 75))
    return Speedup(median=median, p25=p25, p75=p75, low=min(ratios), high=max(ratios), pairs=len(ratios))


LEAST_TURNS = 6
"""Fewer samples have no 95 % interval of their median."""


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median, whatever the distribution: two of the samples, by their ranks.

    The median lies below the k-th smallest of n samples with the probability that fewer than k of n coins show heads.

    Raises:
        ConfigError: if there are fewer than ``LEAST_TURNS`` samples.
    """
    count, ordered = len(samples), sorted(samples)
    if count < LEAST_TURNS:
        raise ConfigError(f"an interval of a median needs at least {LEAST_TURNS} samples, found {count}")
    rank, outside = 0, 0.0
    while (outside := outside + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return ordered[rank - 1], ordered[count - rank]
