from __future__ import annotations

import math

import numpy as np
import pytest

from ivdr_deploy.benchmarks.timing import (
    Summary,
    median_interval,
    percentile,
    speedup,
    summarise,
    time_ms,
    time_pair,
)
from ivdr_deploy.errors import ConfigError


class FakeClock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 100.0
        self.worked: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> str:
        self.now += seconds
        self.worked.append(name)
        return name


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([7.0], 0.5, 7.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.0),  # two of four do not exceed 2
        ([4.0, 1.0, 3.0, 2.0], 51, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 75, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 100, 4.0),
        ([15.0, 20.0, 35.0, 40.0, 50.0], 30, 20.0),
        ([15.0, 20.0, 35.0, 40.0, 50.0], 40, 20.0),
        ([float(value) for value in range(1, 101)], 95, 95.0),
        ([float(value) for value in range(1, 101)], 99, 99.0),
        ([float(value) for value in range(1, 100)], 99, 99.0),  # fewer than 100: the worst one
    ],
)
def test_percentile_is_the_nearest_rank(samples, percent, expected):
    assert percentile(samples, percent) == expected


@pytest.mark.parametrize(("samples", "percent"), [([], 50), ([1.0], 0), ([1.0], 100.5)])
def test_percentile_refuses_what_has_none(samples, percent):
    with pytest.raises(ConfigError, match="a percentile needs samples"):
        percentile(samples, percent)


def test_summary_of_durations():
    assert summarise([10.0, 20.0, 30.0, 100.0]) == Summary(mean=40.0, p50=20.0, p95=100.0, p99=100.0)
    many = [float(value) for value in range(1000, 0, -1)]
    assert summarise(many) == Summary(mean=500.5, p50=500.0, p95=950.0, p99=990.0)


def test_time_is_given_in_milliseconds_beside_the_result():
    clock = FakeClock()

    assert time_ms(lambda: clock.work("once", 0.25), clock=clock) == ("once", 250.0)
    assert clock.worked == ["once"]


@pytest.mark.parametrize(("swap", "order"), [(False, ["engine", "torch"]), (True, ["torch", "engine"])])
def test_a_pair_is_run_in_the_order_asked_for_and_reported_in_one(swap, order):
    clock = FakeClock()

    pair = time_pair(
        lambda: clock.work("engine", 0.5), lambda: clock.work("torch", 1.5), swap=swap, clock=clock
    )

    assert pair == (500.0, 1500.0)
    assert clock.worked == order


def test_speedup_is_taken_pair_by_pair():
    # The machine slows down fourfold half way: the means would say 2.0x, every pair says 2x or 3x.
    result = speedup([10.0, 10.0, 40.0, 40.0], [20.0, 30.0, 80.0, 120.0])

    assert (result.median, result.p25, result.p75) == (2.0, 2.0, 3.0)
    assert (result.low, result.high, result.pairs) == (2.0, 3.0, 4)
    result = speedup([1.0] * 100, [float(value) for value in range(1, 101)])
    assert (result.low, result.p25, result.median, result.p75, result.high) == (1.0, 25.0, 50.0, 75.0, 100.0)


def test_speedup_of_nothing_is_refused():
    with pytest.raises(ConfigError):
        speedup([], [])


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # The ranks of tables of the sign test's interval, e.g. Conover, Practical Nonparametric Statistics.
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (20, 6, 15), (50, 18, 33)],
)
def test_the_interval_of_a_median_lies_at_the_ranks_of_the_tables(count: int, low: int, high: int) -> None:
    samples = [float(value) for value in range(count, 0, -1)]
    assert median_interval(samples) == (low, high)


@pytest.mark.parametrize("count", range(6, 61))
def test_the_interval_of_a_median_is_the_narrowest_of_its_kind_that_covers_95_percent(count: int) -> None:
    low, high = (int(value) for value in median_interval([float(value) for value in range(1, count + 1)]))
    assert low + high == count + 1
    missed = [2 * sum(math.comb(count, heads) for heads in range(rank)) / 2**count for rank in (low, low + 1)]
    assert missed[0] <= 0.05 < missed[1]


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.lognormal(size=(4000, 9))
    covered = [low <= 1.0 <= high for low, high in (median_interval(row) for row in draws.tolist())]
    assert 0.95 <= float(np.mean(covered)) <= 0.97


def test_fewer_samples_have_no_interval() -> None:
    with pytest.raises(ConfigError, match="at least 6 samples, found 5"):
        median_interval([1.0] * 5)
