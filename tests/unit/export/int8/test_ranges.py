"""The ranges of an 8-bit tensor, from values whose right range is known."""

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
