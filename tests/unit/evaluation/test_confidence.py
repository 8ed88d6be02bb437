import numpy as np
import pytest

from ivdr_deploy.evaluation.confidence import calibration_error, compare_confidence


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.91, 0.55, 1.0])
    right = np.array([True, False, True, True])
    # Bin 0.9..1.0 holds three, mean confidence 0.9533, two right; bin 0.5..0.6 one.
    expected = 3 / 4 * abs((0.95 + 0.91 + 1.0) / 3 - 2 / 3) + 1 / 4 * abs(0.55 - 1)
    assert calibration_error(confidence, right) == pytest.approx(expected)


def test_who_crosses_the_threshold_is_named_unless_it_is_a_tie() -> None:
    found = compare_confidence(
        ["a", "b", "c", "d"],
        [0.6, 0.4, 0.50003, 0.9],
        [0.4, 0.7, 0.49999, 0.8],
        expected_right=[],
        right=[],
        abstain=0.5,
        tie_margin=1e-4,
    )
    assert [(entry.uri, entry.expected, entry.found) for entry in found.crossings] == [
        ("a", 0.6, 0.4), ("b", 0.4, 0.7)
    ]  # fmt: skip
    assert found.shift == pytest.approx((0.4 + 0.7 + 0.49999 + 0.8 - 0.6 - 0.4 - 0.50003 - 0.9) / 4)
    assert (found.ece, found.expected_ece) == (None, None)
