"""The ranges of an 8-bit tensor, from values whose right range is known."""

import math

import numpy as np
import pytest
from unit.export.int8.test_channels_last import VIDEO, conv, graph, weights

from ivdr_deploy.export.int8.ranges import Histogram, choose_ranges, observe


def histogram(values: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, 2048)
    return Histogram(float(values.min()), float(values.max()), counts)


def rounding_error(values: np.ndarray, low: float, high: float) -> float:
    step = (high - low) / 255
    return float(np.square(np.clip(np.round(values / step) * step, low, high) - values).mean())


def test_a_histogram_counts_every_value_of_every_clip_once() -> None:
    source = graph(conv("x", "y", kernel=(1, 1, 1)), **weights("y", (1, 1, 1)))
    seen = observe(source.model, VIDEO, ["x"])["x"]
    pixels = np.bincount(VIDEO.ravel(), minlength=256)
    assert (seen.low, seen.high) == (float(VIDEO.min()), float(VIDEO.max()))
    assert seen.counts.sum() == VIDEO.size
    assert np.array_equal(seen.counts[seen.counts > 0], pixels[pixels > 0])


def test_min_max_keeps_everything_and_percentile_gives_up_the_tails() -> None:
    values = np.concatenate([np.linspace(-1, 3, 99_990), np.full(10, 100.0)])
    seen = {"x": histogram(values)}
    assert choose_ranges(seen, "min-max")["x"] == (-1.0, 100.0)
    low, high = choose_ranges(seen, "percentile")["x"]
    assert low == pytest.approx(-1, abs=0.1)
    assert high == pytest.approx(3, abs=0.1)


def test_percentile_gives_up_one_value_of_ten_thousand_at_each_end() -> None:
    values = np.random.default_rng(0).normal(size=1_000_000)
    seen = {"x": histogram(values)}
    bin_width = (seen["x"].high - seen["x"].low) / 2048
    assert choose_ranges(seen, "percentile")["x"] == pytest.approx(
        tuple(np.quantile(values, [1e-4, 1 - 1e-4])), abs=2 * bin_width
    )


def test_percentile_gives_up_no_more_than_it_may_and_could_not_give_up_a_bin_more() -> None:
    seen = Histogram(0.0, 2048.0, np.array([60, 50, *[100_000 // 1022] * 2044, 50, 60]))  # bins of width 1
    tail = seen.counts.sum() * 1e-4
    low, high = choose_ranges({"x": seen}, "percentile")["x"]
    outside = int(seen.counts[: int(low)].sum()), int(seen.counts[int(high) :].sum())
    more = int(seen.counts[: int(low) + 1].sum()), int(seen.counts[int(high) - 1 :].sum())
    assert (low, high) == (int(low), int(high))
    assert max(outside) < tail <= min(more)


def test_entropy_cuts_a_lonely_outlier_and_keeps_an_even_spread() -> None:
    rng = np.random.default_rng(0)
    lonely = np.concatenate([rng.normal(size=100_000), [40.0, -40.0]])
    low, high = choose_ranges({"x": histogram(lonely)}, "entropy")["x"]
    assert high - low < 50
    assert rounding_error(lonely[:-2], low, high) < rounding_error(lonely[:-2], -40.0, 40.0) / 2
    even = rng.uniform(0, 1, 100_000)
    low, high = choose_ranges({"x": histogram(even)}, "entropy")["x"]
    assert high > 0.95


def test_a_tensor_that_holds_one_value_has_a_range() -> None:
    seen = {"x": Histogram(0.0, 0.0, np.array([10] + [0] * 2047))}
    for method in ("min-max", "percentile", "entropy"):
        low, high = choose_ranges(seen, method)["x"]
        assert low <= 0 <= high


def divergence(seen: Histogram, share: float) -> float:
    """What is lost when only a share of the range is kept, value by value: as the method is written down."""
    low, high = min(seen.low * share, 0.0), max(seen.high * share, 0.0)
    width = (seen.high - seen.low) / 2048
    bins = [
        (seen.low + (place + 0.5) * width, count / seen.counts.sum())
        for place, count in enumerate(seen.counts)
    ]
    level = [min(255, max(0, round((centre - low) / (high - low) * 255))) for centre, _ in bins]
    held, kept = dict.fromkeys(level, 0.0), dict.fromkeys(level, 0)
    for (centre, mass), own in zip(bins, level, strict=True):
        held[own] += mass
        kept[own] += low <= centre <= high and mass > 0
    told = [
        max(held[own] / kept[own], 1e-9) if low <= centre <= high else 1e-9
        for (centre, mass), own in zip(bins, level, strict=True)
        if mass
    ]
    return sum(
        mass * math.log(mass / said)
        for mass, said in zip([mass for _, mass in bins if mass], told, strict=True)
    )


def test_entropy_keeps_the_share_that_loses_least() -> None:
    rng = np.random.default_rng(1)
    half = np.abs(rng.normal(size=50_000))  # as after a ReLU: all on one side
    spreads = [
        rng.uniform(-1, 1, 50_000),
        rng.standard_t(3, size=50_000),
        rng.lognormal(size=50_000),
        half**2,
        -(half**2),
        -np.append(half, 15.0),
        np.append(half, 15.0),
    ]
    chosen = []
    for values in spreads:
        seen = histogram(values)
        shares = np.linspace(0.2, 1.0, 41)
        best = shares[int(np.argmin([divergence(seen, share) for share in shares]))]
        found = choose_ranges({"x": seen}, "entropy")["x"]
        assert found == pytest.approx((seen.low * best, seen.high * best))
        chosen.append(round(float(best), 2))
    assert len(set(chosen)) >= 4, chosen  # or one answer would do for all
