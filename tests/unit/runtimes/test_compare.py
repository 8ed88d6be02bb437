from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.errors import ExportError, ParityError
from ivdr_deploy.runtimes.compare import (
    TOLERANCE,
    check_parity,
    compare_outputs,
    describe_failures,
    reference_outputs,
)
from ivdr_deploy.runtimes.torch_runtime import TorchRuntime
from ivdr_deploy.runtimes.variants import open_variant
from ivdr_deploy.spec import Precision


def compare(expected, found):
    return compare_outputs(expected, found, precision="fp32")


def test_measures_the_largest_difference_and_the_smallest_cosine() -> None:
    expected = {"logits": np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)}
    found = {"logits": np.array([[1.0, 0.0], [2.0, 2.0]], np.float32)}
    (entry,) = compare(expected, found)
    assert entry.output == "logits"
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
    assert describe_failures((near, far)) == "inter differs by 1.01e-04 (tolerance 1.00e-04)"


def test_values_of_one_size_may_differ_in_proportion_to_the_largest() -> None:
    expected = {"logits": np.array([[50.0, -20.0, 30.0]])}
    near, far = (compare(expected, {"logits": expected["logits"] + shift})[0] for shift in (4e-3, 6e-3))
    assert near.tolerance == pytest.approx(5e-3)
    assert near.passed
    assert not far.passed


@pytest.mark.parametrize("large", [4.0, 40.0, 4e6])
def test_a_large_value_makes_others_count_as_four_times_a_middling_one_at_most(large: float) -> None:
    expected = {"logits": np.array([[1.0, -1.0, 1.0, large]])}
    moved = np.array([[1.0, 0.0, 0.0, 0.0]]) * TOLERANCE["fp32"] * 4
    near, far = (compare(expected, {"logits": expected["logits"] + part * moved})[0] for part in (0.99, 1.01))
    assert near.passed
    assert not far.passed
    assert far.tolerance == pytest.approx(4 * TOLERANCE["fp32"])


def test_a_value_that_fails_is_named_beside_a_larger_difference_that_passes() -> None:
    """The huge value may differ by 1e4; that is no reason to overlook the first one, which may by 4e-4."""
    expected = np.array([[1.0, -1.0, 1.0, 1e8]])
    for place in (0, 2):
        moved = np.array([[0.0, 0.0, 0.0, 5e3]])
        moved[0, place] = 1e-3
        (entry,) = compare({"logits": expected}, {"logits": expected + moved})
        assert not entry.passed
        assert entry.max_abs_diff == pytest.approx(1e-3)
        assert entry.tolerance == pytest.approx(4 * TOLERANCE["fp32"])


@pytest.mark.parametrize("classes", [2, 3, 10, 400])
@pytest.mark.parametrize("huge", [1e6, 3e38])
def test_one_huge_value_per_clip_excuses_no_other(classes: int, huge: float) -> None:
    """A network with zeroed weights and one large bias, beside golden outputs that were changed to have it as well."""
    expected = np.random.default_rng(0).normal(size=(4, classes)).astype(np.float32)
    expected[:, 0] = huge
    zeroed = np.zeros_like(expected)
    zeroed[:, 0] = huge
    (entry,) = compare({"logits": expected}, {"logits": zeroed})
    assert not entry.passed
    assert entry.tolerance < 1e-2
    nearly = expected * (1 + 5e-5)
    assert compare({"logits": expected}, {"logits": nearly.astype(np.float32)})[0].passed


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_expected_values_that_are_not_finite_excuse_nothing(value: float) -> None:
    expected = np.array([[1.0, 2.0, value]], np.float32)
    for found in (expected, np.zeros_like(expected)):
        (entry,) = compare({"logits": expected}, {"logits": found})
        assert (entry.max_abs_diff, entry.passed) == (np.inf, False)


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


def test_two_zero_vectors_agree_and_zero_has_no_direction_in_common_with_another() -> None:
    zeros, ones = np.zeros((2, 4)), np.ones((2, 4))
    (entry,) = compare({"feature": zeros}, {"feature": zeros})
    assert (entry.max_abs_diff, entry.min_cosine) == (0.0, 1.0)
    half = np.concatenate([ones[:1], zeros[:1]])
    for expected, found in ((ones, half), (half, ones)):
        (entry,) = compare({"feature": expected}, {"feature": found})
        assert entry.min_cosine == 0.0


def test_a_cosine_is_never_above_1() -> None:
    rows = np.random.default_rng(5).normal(size=(300, 3))
    smallest = [compare({"feature": row[None]}, {"feature": row[None]})[0].min_cosine for row in rows]
    assert max(smallest) == 1.0
    assert min(smallest) == pytest.approx(1.0)


def test_outputs_without_any_clip_do_not_pass() -> None:
    (entry,) = compare({"logits": np.zeros((0, 4))}, {"logits": np.zeros((0, 4))})
    assert (entry.max_abs_diff, entry.passed) == (np.inf, False)


def test_every_precision_has_a_tolerance_and_fewer_bits_a_larger_one() -> None:
    assert set(TOLERANCE) == set(get_args(Precision))
    assert TOLERANCE["fp32"] < TOLERANCE["fp16"] < TOLERANCE["bf16"] < TOLERANCE["int8"] == TOLERANCE["fp8"]


def test_the_gate_opens_for_the_same_network_only(bundle: Path, tiny_bundle: Path) -> None:
    opened, other = open_bundle(bundle), open_bundle(tiny_bundle)
    parity = check_parity(opened.golden(), open_variant(opened, opened.variant("onnx-fp32")))
    assert [entry.output for entry in parity] == ["logits", "feature"]
    with pytest.raises(ParityError, match="feature differs by"):
        check_parity(opened.golden(), open_variant(other, other.variant("onnx-fp32")))
    with pytest.raises(ExportError, match="no golden clips"):
        check_parity(Golden(), open_variant(other, other.variant("onnx-fp32")))


def test_a_wrong_input_cannot_pass(bundle: Path) -> None:
    """Colour order, frame order and a one-level shift of the pixels all show."""
    opened = open_bundle(bundle)
    golden, runtime = opened.golden(), open_variant(opened, opened.variant("onnx-fp32"))
    for wrong in (golden.video[..., ::-1], golden.video[:, ::-1], golden.video // 2 * 2):
        with pytest.raises(ParityError):
            check_parity(replace(golden, video=np.ascontiguousarray(wrong)), runtime)


def test_reference_outputs_are_finite(bundle: Path) -> None:
    opened = open_bundle(bundle)
    golden = opened.golden()
    model = load_checkpoint(opened.path / "model.safetensors").model
    runtime = TorchRuntime(model, clip=opened.manifest.clip, output_names=opened.manifest.output_names)
    assert set(reference_outputs(runtime, golden.video)) == set(golden.expected)
    next(model.backbone.parameters()).data.fill_(float("inf"))
    with pytest.raises(ExportError, match="NaN or infinity in logits, feature"):
        reference_outputs(runtime, golden.video)
