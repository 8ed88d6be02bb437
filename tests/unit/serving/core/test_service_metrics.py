from __future__ import annotations

import pytest

from ivdr_deploy.serving.core import metrics as counted
from ivdr_deploy.serving.core.metrics import METRICS, Metrics, Series


def by_name(metrics: Metrics) -> dict[str, float]:
    return {
        series.name + "".join(f"[{name}={text}]" for name, text in series.labels): value
        for series, value in metrics.values().items()
    }


def test_counters_add_up_by_label() -> None:
    metrics = Metrics()
    for outcome in ("ok", "too_large", "ok"):
        metrics.add(counted.REQUESTS, label=outcome)
    metrics.add(counted.CLIPS, 10)
    assert by_name(metrics) == {
        "ivdr_requests_total[outcome=ok]": 2,
        "ivdr_requests_total[outcome=too_large]": 1,
        "ivdr_clips_total": 10,
    }


def test_gauge_falls_again() -> None:
    metrics = Metrics()
    metrics.add(counted.BUSY)
    metrics.add(counted.BUSY, -1)
    assert metrics.values() == {Series("ivdr_busy", counted.BUSY): 0}


def test_buckets_are_cumulative_and_hold_their_upper_bound() -> None:
    metrics = Metrics()
    for clips in (1, 4, 5, 65):
        metrics.observe(counted.BATCH_CLIPS, clips)
    values = by_name(metrics)
    bounds = ("1", "2", "4", "8", "16", "32", "64", "+Inf")
    found = [values[f"ivdr_batch_clips_bucket[le={bound}]"] for bound in bounds]
    assert found == [1, 1, 2, 3, 3, 3, 3, 4]
    assert (values["ivdr_batch_clips_sum"], values["ivdr_batch_clips_count"]) == (75, 4)


def test_listener_gets_every_value_of_a_histogram() -> None:
    heard = []
    metrics = Metrics(on_observe=lambda metric, value: heard.append((metric, value)))
    metrics.observe(counted.INFER_SECONDS, 0.5)
    metrics.add(counted.CLIPS)
    assert heard == [(counted.INFER_SECONDS, 0.5)]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_definitions_are_sound(metric: counted.Metric) -> None:
    assert metric.help
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
