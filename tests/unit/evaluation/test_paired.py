import math

import pytest

from ivdr_deploy.evaluation.paired import PairedChange, _exact_bounds


def binomial(count: int, total: int, share: float) -> float:
    """Probability of at most ``count``, term by term."""
    return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(count + 1))


@pytest.mark.parametrize(("count", "total"), [(0, 6), (1, 6), (3, 39), (39, 39), (120, 1000)])
def test_bounds_are_where_the_binomial_has_the_tail(count: int, total: int) -> None:
    low, high = _exact_bounds(count, total)
    assert 0 <= low <= count / total <= high <= 1
    if count:
        assert 1 - binomial(count - 1, total, low) == pytest.approx(0.0125, rel=1e-6)
    if count < total:
        assert binomial(count, total, high) == pytest.approx(0.0125, rel=1e-6)


def test_change_counts_pairs_and_not_shares() -> None:
    before = [True, True, False, False, True]
    now = [True, False, True, True, True]
    change = PairedChange.between(before, now)
    assert (change.lost, change.won, change.total) == (1, 2, 5)
    assert change.value == pytest.approx(0.2)
    low, high = change.interval
    assert -1 < low < 0.2 < high < 1
    assert change.to_dict() == {"value": 0.2, "lost": 1, "won": 2, "total": 5, "low": low, "high": high}


def test_no_change_says_little_on_few_videos_and_much_on_many() -> None:
    few, many = PairedChange(0, 0, 6).interval, PairedChange(0, 0, 6000).interval
    assert few[0] < -0.5
    assert -1e-3 < many[0] < 0 < many[1] < 1e-3
    assert PairedChange(0, 0, 0).interval == (-1.0, 1.0)
    assert PairedChange(0, 0, 0).to_dict()["value"] is None


def test_ten_lost_and_none_won_is_a_fall() -> None:
    low, high = PairedChange(10, 0, 92).interval
    assert low < -10 / 92 < high < 0


def test_large_lists_are_quick_and_do_not_overflow() -> None:
    low, high = PairedChange(3000, 2500, 1_000_000).interval
    assert -8e-4 < low < -5e-4 < high < -2e-4
