import numpy as np
import pytest

from ivdr_deploy.runtimes.compare import TOLERANCE, compare_outputs, describe_failures


def compare(expected, found):
    return compare_outputs(expected, found, runtime="onnxruntime", precision="fp32")


def test_measures_the_largest_difference_and_the_smallest_cosine() -> None:
    expected = {"logits": np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)}
    found = {"logits": np.array([[1.0, 0.0], [2.0, 2.0]], np.float32)}
    (entry,) = compare(expected, found)
    assert (entry.output, entry.runtime, entry.precision) == ("logits", "onnxruntime", "fp32")
    assert entry.max_abs_diff == 2.0
    assert entry.min_cosine == pytest.approx(np.sqrt(0.5))
    assert not entry.passed


def test_the_tolerance_decides() -> None:
    expected = {"inter": np.zeros((1, 2), np.float64)}
    below, above = 0.99 * TOLERANCE["fp32"], 1.01 * TOLERANCE["fp32"]
    (near,) = compare(expected, {"inter": np.full((1, 2), below)})
    (far,) = compare(expected, {"inter": np.full((1, 2), above)})
    assert near.passed
    assert not far.passed
    assert describe_failures((near, far)) == "inter differs by 1.01e-04 (tolerance 1e-04)"


def test_large_values_may_differ_in_proportion() -> None:
    expected = {"logits": np.array([[50.0, -1.0]])}
    near, far = (compare(expected, {"logits": expected["logits"] + shift})[0] for shift in (4e-3, 6e-3))
    assert near.tolerance == pytest.approx(5e-3)
    assert near.passed
    assert not far.passed


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"logits": np.array([[np.nan, 0.0]], np.float32)},
        {"logits": np.array([[np.inf, 0.0]], np.float32)},
        {"logits": np.zeros((2, 2), np.float32)},
        {"logits": np.zeros((1, 3), np.float32)},
    ],
    ids=["absent", "nan", "inf", "more clips", "more classes"],
)
def test_an_output_that_cannot_be_compared_fails(found) -> None:
    (entry,) = compare({"logits": np.zeros((1, 2), np.float32)}, found)
    assert entry.max_abs_diff == np.inf
    assert not entry.passed


def test_each_slot_has_its_own_cosine() -> None:
    slots = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    (entry,) = compare({"intra": slots}, {"intra": slots[:, ::-1]})
    assert entry.min_cosine == 0.0


def test_two_zero_vectors_agree() -> None:
    (entry,) = compare({"feature": np.zeros((1, 4))}, {"feature": np.zeros((1, 4))})
    assert (entry.max_abs_diff, entry.min_cosine) == (0.0, 1.0)
