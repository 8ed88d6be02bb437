from __future__ import annotations

import numpy as np
import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.events import Event, EventFinder, TimelinePlan

LABELS = ("wave", "sit")


def found(
    scores: list[float], *, length: float = 1.0, **plan: float
) -> list[tuple[str, float, float, float]]:
    """Events of windows that stand for ``length`` seconds each; the other label gets what is left."""
    finder = EventFinder(LABELS, TimelinePlan(**plan))  # type: ignore[arg-type]
    events: list[Event] = []
    for number, score in enumerate(scores):
        part = (number * length, (number + 1) * length)
        events += finder.add(part, np.float32([score, 1 - score]))
    events += finder.finish()
    return [(e.label, e.start_seconds, e.end_seconds, pytest.approx(e.score, abs=1e-6)) for e in events]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.1], []),
        ([0.1, 0.9, 0.1], [(1, 2, 0.9)]),
        ([0.1, 0.8, 0.6, 0.1], [(1, 3, 0.7)]),
        ([0.8, 0.4, 0.6, 0.1], [(0, 3, 0.6)]),  # it wavers above `leave` and stays one
        ([0.8, 0.2, 0.8, 0.2], [(0, 1, 0.8), (2, 3, 0.8)]),
        ([0.4, 0.4, 0.4], []),  # above `leave` alone begins nothing
        ([0.5, 0.3, 0.29], [(0, 2, 0.4)]),  # both thresholds count themselves
        ([0.1, 0.9, 0.9], [(1, 3, 0.9)]),  # until the end of the video
        ([0.4, 0.9, 0.1], [(1, 2, 0.9)]),  # does not reach back
    ],
)
def test_an_event_begins_above_one_threshold_and_ends_below_another(
    scores: list[float], expected: list[tuple[float, float, float]]
) -> None:
    waves = [
        event[1:] for event in found(scores, leave=0.3, enter=0.5, min_seconds=0.5) if event[0] == "wave"
    ]
    assert waves == [pytest.approx(event) for event in expected]


def test_each_label_has_events_of_its_own_and_they_may_overlap() -> None:
    events = found([0.9, 0.5, 0.1], leave=0.3, enter=0.5, min_seconds=0.0)
    assert sorted(event[:3] for event in events) == [("sit", 1.0, 3.0), ("wave", 0.0, 2.0)]


def test_what_is_too_short_is_none() -> None:
    scores = [0.1, 0.9, 0.1, 0.9, 0.9, 0.1]
    waves = [event for event in found(scores, length=0.3, min_seconds=0.5) if event[0] == "wave"]
    assert [event[1:3] for event in waves] == [pytest.approx((0.9, 1.5))]
    assert len([event for event in found(scores, length=0.3, min_seconds=0.0) if event[0] == "wave"]) == 2
    exactly = found([0.1, 0.9, 0.1], length=0.5, min_seconds=0.5)
    assert [event[0] for event in exactly].count("wave") == 1


def test_an_event_is_told_with_the_first_window_after_it() -> None:
    finder = EventFinder(LABELS, TimelinePlan())
    assert finder.add((0.0, 1.0), np.float32([0.9, 0.1])) == []
    assert finder.add((1.0, 2.0), np.float32([0.9, 0.1])) == []
    (event,) = finder.add((2.0, 3.0), np.float32([0.1, 0.9]))
    assert (event.label, event.start_seconds, event.end_seconds) == ("wave", 0.0, 2.0)
    (last,) = finder.finish()
    assert (last.label, last.start_seconds, last.end_seconds) == ("sit", 2.0, 3.0)
    assert finder.finish() == []


@pytest.mark.parametrize(
    "values",
    [{"hop": -1}, {"enter": 1.5}, {"leave": 0.0}, {"enter": 0.2, "leave": 0.3}, {"min_seconds": -1.0},
     {"enter": float("nan")}, {"leave": float("nan")}, {"min_seconds": float("nan")}, {"min_seconds": float("inf")}],
)  # fmt: skip
def test_thresholds_that_mean_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TimelinePlan(**values)  # type: ignore[arg-type]
