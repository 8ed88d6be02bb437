"""Weights of a source go into a network whole and as they are, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from bundles import TINY_CLIP
from torch import Tensor

from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.export.importing import assign_weights
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import ModelSpec

WEIGHT = "classifier.linear.weight"
COUNTER = "backbone.2.num_batches_tracked"


def network() -> VideoModel:
    return build_model(ModelSpec(backbone="tiny", num_slots=0, clip_dim=0, num_classes=3), TINY_CLIP)


def weights(**changes: Tensor | None) -> dict[str, tuple[str, Tensor]]:
    """What a source of the same network gives, with some tensors changed or, with None, taken away."""
    state: dict[str, Tensor | None] = {**network().state_dict(), **changes}
    return {name: (f"their.{name}", value) for name, value in state.items() if value is not None}


def test_every_number_goes_where_it_belongs() -> None:
    model, found = network(), weights()
    tensors = assign_weights(model, found, where="w")
    assert {tensor.target for tensor in tensors} == set(model.state_dict())
    assert all(torch.equal(value, found[name][1]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_point_numbers_of_another_size_are_converted(dtype: torch.dtype) -> None:
    model, value = network(), torch.randn(3, 96).to(dtype)
    assign_weights(model, weights(**{WEIGHT: value}), where="w")
    assert torch.equal(model.state_dict()[WEIGHT], value.float())


def test_counters_of_batches_may_be_missing() -> None:
    model = network()
    before = model.state_dict()[COUNTER].clone()
    assign_weights(model, weights(**{COUNTER: None}), where="w")
    assert torch.equal(model.state_dict()[COUNTER], before)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (WEIGHT, lambda: None, "lacks classifier.linear.weight"),
        ("more", lambda: torch.zeros(2), "has no place for: 'their.more'"),
        ("m" * 5000, lambda: torch.zeros(2), "has no place for: 'their.mmm"),
        (
            WEIGHT,
            lambda: torch.zeros(96, 3),
            r"'their.classifier.linear.weight' \(96, 3\) instead of \(3, 96\)",
        ),
        (WEIGHT, lambda: torch.zeros(1).expand(10**7, 10**7), r"\(10000000, 10000000\) instead of"),
        (COUNTER, lambda: torch.zeros(3, dtype=torch.int64), r"\(3,\) instead of \(\)"),
        (COUNTER, lambda: torch.tensor(0.5), "torch.float32 on cpu instead of torch.int64"),
        (WEIGHT, lambda: torch.ones(3, 96, dtype=torch.int8), "torch.int8 on cpu instead of torch.float32"),
        (WEIGHT, lambda: torch.ones(3, 96).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (WEIGHT, lambda: torch.ones(3, 96, dtype=torch.bool), "torch.bool"),
        (WEIGHT, lambda: torch.ones(3, 96, dtype=torch.complex64), "torch.complex64"),
        (WEIGHT, lambda: torch.ones(3, 96).to_sparse(), "torch.sparse_coo torch.float32"),
        (WEIGHT, lambda: torch.ones(3, 96, device="meta"), "torch.float32 on meta"),
        (
            WEIGHT,
            lambda: torch.full((3, 96), torch.nan),
            "NaN or infinity in 'their.classifier.linear.weight'",
        ),
        (WEIGHT, lambda: torch.full((3, 96), 1e300, dtype=torch.float64), "NaN or infinity in"),
    ],
    ids=[
        "missing",
        "one too many",
        "one of a long name too many",
        "turned",
        "one number that stands for a hundred million million",
        "a counter that is a list",
        "a counter that is no whole number",
        "8 bits without their scale",
        "8 bits of floating point",
        "bool",
        "complex",
        "sparse",
        "without values",
        "NaN",
        "too large for fp32",
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_taken(
    name: str, value: Callable[[], Tensor | None], said: str
) -> None:
    model = network()
    before = {key: held.clone() for key, held in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=said) as caught:
            assign_weights(model, weights(**{name: value()}), where="weights.pth")
    assert caught.value.message.startswith("weights.pth ")
    assert len(caught.value.message) < 400
    assert all(torch.equal(held, before[key]) for key, held in model.state_dict().items())
