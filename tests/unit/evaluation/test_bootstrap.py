"""Intervals over groups of questions that are alike."""

import math

import numpy as np
import pytest

from ivdr_deploy.evaluation.bootstrap import mean_estimate, share_estimate
from ivdr_deploy.evaluation.metrics import Accuracy


def test_videos_by_themselves_have_about_wilsons_interval() -> None:
    right = [1] * 140 + [0] * 60
    found = share_estimate(right, [1] * 200, [str(row) for row in range(200)])
    low, high = Accuracy(140, 200).interval
    assert found.value == 0.7
    assert found.units == 200
    assert abs(found.low - low) < 0.01
    assert abs(found.high - high) < 0.01


def test_videos_of_few_people_say_less_than_as_many_videos_of_many() -> None:
    right = ([1] * 20 + [0] * 20) * 5  # whole people are right, or wrong
    alone = share_estimate(right, [1] * 200, [str(row) for row in range(200)])
    people = share_estimate(right, [1] * 200, [str(row // 20) for row in range(200)])
    assert people.value == alone.value == 0.5
    assert people.units == 10
    assert people.high - people.low > 2.5 * (alone.high - alone.low)


def test_clips_of_a_video_are_no_questions_of_their_own() -> None:
    found = share_estimate([10] * 15 + [0] * 5, [10] * 20, [str(row) for row in range(20)])
    low, high = Accuracy(150, 200).interval
    assert found.value == 0.75
    assert found.high - found.low > 2.5 * (high - low)


def test_where_all_agree_the_number_of_videos_gives_the_width() -> None:
    found = share_estimate([1] * 6, [1] * 6, ["a", "a", "a", "b", "b", "b"])
    assert (found.low, found.high) == Accuracy(6, 6).interval
    assert share_estimate([1, 0], [1, 1], ["a", "a"]).units == 1


@pytest.mark.parametrize("units", [10, 40])
def test_the_ends_are_those_between_which_19_of_20_draws_lie(units: int) -> None:
    """Half of the units are right. How many a draw holds is binomial, so that its ends are known exactly."""
    counts = np.cumsum([math.comb(units, count) / 2**units for count in range(units + 1)])
    low, high = (int(np.searchsorted(counts, share)) / units for share in (0.025, 0.975))
    right = [1, 0] * (units // 2)
    names = [str(unit) for unit in range(units)]
    clips = share_estimate(right * 20, [1] * 20 * units, names * 20)  # of so many Wilson's interval is narrow
    assert (clips.low, clips.high) == pytest.approx((low, high))
    mean = mean_estimate([3.0 * value - 1 for value in right], names)
    assert (mean.low, mean.high) == pytest.approx((3 * low - 1, 3 * high - 1))


def test_of_nothing_nothing_is_known() -> None:
    found = share_estimate([], [], [])
    assert math.isnan(found.value)
    assert found.to_dict() == {"value": None, "low": 0.0, "high": 1.0, "units": 0}


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        people = rng.normal(0.3, 1.0, 25)
        values = (people[:, None] + rng.normal(0, 0.2, (25, 4))).ravel()
        found = mean_estimate(values.tolist(), [str(row // 4) for row in range(100)])
        covered += found.low <= 0.3 <= found.high
    assert covered >= 50
    assert mean_estimate([1.0, 2.0], ["a", "a"]).low == -math.inf


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_answers_have_the_same_interval(seed: int) -> None:
    right = np.random.default_rng(seed).integers(0, 2, 50).tolist()
    units = [str(row // 5) for row in range(50)]
    assert share_estimate(right, [1] * 50, units) == share_estimate(right, [1] * 50, units)
