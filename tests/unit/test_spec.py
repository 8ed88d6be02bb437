from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any, get_args

import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.spec import (
    MAX_CLIPS,
    CheckpointInfo,
    ClipSpec,
    ModelSpec,
    Precision,
    TrainingState,
    ViewPlan,
)

HALF = (0.5, 0.5, 0.5)
I3D = ClipSpec(
    num_frames=64, frame_stride=1, target_fps=25, short_side=256, crop_size=224, mean=HALF, std=HALF
)
TORCHVISION = ClipSpec(
    frame_stride=1,
    target_fps=15,
    short_side=0,
    exact_size=(128, 171),
    crop_size=112,
    mean=(0.43216, 0.394666, 0.37645),
    std=(0.22803, 0.22145, 0.216989),
)


@pytest.mark.parametrize(
    ("clip", "pinned"),
    [
        (ClipSpec(), "fe869c1d539860e4362f18a3b967bb58268c18c776ada5b25487ad6d73f2ac8c"),
        (I3D, "04d81117b693c36b67c53be8ed08be07b2df79d7825d28f193f0b9a72cbc11c2"),
        (TORCHVISION, "9a3bebfbddad6595292ce45502b1c9ff9444e762c5c8410fde5d741bbf833362"),
    ],
    ids=["default", "i3d", "torchvision"],
)
def test_contract_hash_is_pinned(clip: ClipSpec, pinned: str) -> None:
    """A change of these values makes every artifact in the world refuse its neighbours: never by accident."""
    assert clip.contract_hash == pinned


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 8},
        {"frame_stride": 2},
        {"target_fps": 25.0},
        {"short_side": 144},
        {"crop_size": 96},
        {"mean": HALF},
        {"std": HALF},
    ],
)
def test_every_field_of_the_contract_changes_its_hash(change: dict[str, object]) -> None:
    changed = replace(ClipSpec(), **change)
    assert changed.contract_hash != ClipSpec().contract_hash
    (difference,) = ClipSpec().differences(changed)
    assert difference.startswith(next(iter(change)))


def test_a_field_added_later_counts_only_where_it_says_something() -> None:
    """The hash of a contract that was written before ``exact_size`` existed is taken without it."""
    (later,) = [item.name for item in fields(ClipSpec) if item.metadata.get("added_later")]
    assert later == "exact_size"
    older = {name: value for name, value in to_dict(ClipSpec()).items() if name != later}
    assert from_dict(ClipSpec, older, where="test").contract_hash == ClipSpec().contract_hash
    sizes = [(128, 171), (171, 128), (129, 171)]
    hashes = {ClipSpec(short_side=0, exact_size=size).contract_hash for size in sizes}
    assert len(hashes) == 3
    assert ClipSpec(short_side=128).contract_hash not in hashes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"mean": (0, 0, 0), "std": (1, 1, 1)}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({"mean": (-0.0, 0.0, 0.0)}, {"mean": (0.0, 0.0, 0.0)}),
        ({"mean": [0.5, 0.5, 0.5]}, {"mean": HALF}),
        ({"target_fps": 25}, {"target_fps": 25.0}),
        ({"num_frames": 8.0, "frame_stride": True}, {"num_frames": 8, "frame_stride": 1}),
        ({"short_side": 0, "exact_size": [128, 171]}, {"short_side": 0, "exact_size": (128, 171)}),
    ],
    ids=["ints", "minus zero", "list", "rate", "whole", "size"],
)
def test_equal_contracts_have_one_hash_however_the_numbers_were_written(one: dict, other: dict) -> None:
    first, second = ClipSpec(**one), ClipSpec(**other)
    assert first == second
    assert hash(first) == hash(second)
    assert first.contract_hash == second.contract_hash
    read = from_dict(ClipSpec, json.loads(json.dumps(to_dict(first))), where="test")
    assert read.contract_hash == first.contract_hash


@pytest.mark.parametrize(
    "bad",
    [
        {"num_frames": 0},
        {"num_frames": 7.5},
        {"frame_stride": 0},
        {"crop_size": 0},
        {"crop_size": 129},
        {"short_side": 0},
        {"short_side": -1, "exact_size": (128, 171)},
        {"short_side": 128, "exact_size": (128, 171)},
        {"exact_size": (128, 171)},
        {"crop_size": 129, "short_side": 0, "exact_size": (128, 171)},
        {"crop_size": 129, "short_side": 0, "exact_size": (171, 128)},
        {"target_fps": 0.0},
        {"target_fps": float("inf")},
        {"target_fps": float("nan")},
        {"mean": (0.5, float("nan"), 0.5)},
        {"std": (0.1, 0.0, 0.1)},
        {"std": (0.1, float("inf"), 0.1)},
    ],
    ids=str,
)
def test_impossible_contracts_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad)).split("_")[0]):
        ClipSpec(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("large", [10**6, 10**12, 10**4000], ids=["million", "billions", "digits"])
@pytest.mark.parametrize(
    "field", ["num_frames", "frame_stride", "short_side", "exact_size", "crop_size", "target_fps"]
)
def test_a_size_that_no_clip_has_is_refused_in_a_short_message(field: str, large: int) -> None:
    """A contract comes from foreign files too: by its sizes memory is taken and frames are scaled."""
    values: dict[str, object] = {field: large}
    if field == "exact_size":
        values = {"short_side": 0, field: [128, large]}
    if field == "crop_size":
        values |= {"short_side": large}
    with pytest.raises(ConfigError, match=field) as caught:
        from_dict(ClipSpec, values, where="test")
    assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError) as caught:
        from_dict(ClipSpec, {**values, "num_frames": -large}, where="test")
    assert len(str(caught.value)) < 300


def test_the_largest_contract_is_read() -> None:
    largest = ClipSpec(
        num_frames=4096, frame_stride=1 << 16, target_fps=1000, short_side=8192, crop_size=8192
    )
    assert from_dict(ClipSpec, to_dict(largest), where="test") == largest
    assert ClipSpec(short_side=0, exact_size=(8192, 8192), crop_size=8192).clip_shape == (16, 8192, 8192, 3)


@pytest.mark.parametrize("large", [10**9, 10**30, 10**4000], ids=["billion", "30", "digits"])
@pytest.mark.parametrize(
    ("record", "values"),
    [
        (ViewPlan, {"hop": 1, "placement": "sliding"}),
        (ViewPlan, {"num_clips": 1}),
        (ViewPlan, {"spatial_crops": 1}),
        (ModelSpec, {"num_slots": -1}),
        (ModelSpec, {"clip_dim": -1}),
        (ModelSpec, {"num_classes": -1}),
        (ModelSpec, {"slot_dim": -1}),
    ],
)
def test_foreign_numbers_are_quoted_short(record: type, values: dict[str, Any], large: int) -> None:
    name, sign = next(iter(values.items()))
    with pytest.raises(ConfigError, match=name) as caught:
        from_dict(record, {**values, name: sign * large}, where="test")
    assert len(str(caught.value)) < 300


def test_the_view_plan_is_beside_the_contract() -> None:
    """Nothing that says which clips are looked at is a field of the contract, so none can enter its hash."""
    assert not {item.name for item in fields(ClipSpec)} & {item.name for item in fields(ViewPlan)}


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"num_clips": 0}, "num_clips"),
        ({"num_clips": MAX_CLIPS + 1}, "num_clips"),
        ({"num_clips": MAX_CLIPS // 3 + 1, "spatial_crops": 3}, "num_clips"),
        ({"hop": -1, "placement": "sliding"}, "hop"),
        ({"hop": 8}, "sliding"),
        ({"spatial_crops": 2}, "spatial_crops"),
    ],
    ids=str,
)
def test_impossible_view_plans_are_refused(bad: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ViewPlan(**bad)  # type: ignore[arg-type]


def test_a_view_plan_says_how_many_views_it_gives_and_what_it_is() -> None:
    assert ViewPlan(num_clips=MAX_CLIPS).max_views == MAX_CLIPS
    assert ViewPlan(num_clips=10, spatial_crops=3).max_views == 30
    assert str(ViewPlan(num_clips=1)) == "1 clip, centre crop"
    assert str(ViewPlan(num_clips=10, spatial_crops=3)) == "10 clips, 3 crops each"
    assert (
        str(ViewPlan(placement="sliding", num_clips=9))
        == "sliding clips one after the other, at most 9, centre crop"
    )
    assert "every 8 frames" in str(ViewPlan(placement="sliding", hop=8))


def test_a_choice_written_as_another_number_becomes_the_choice() -> None:
    plan = from_dict(ViewPlan, {"spatial_crops": 3.0}, where="test")
    assert isinstance(plan.spatial_crops, int)


def test_a_head_is_valid_only_up_to_the_last_change_of_the_backbone() -> None:
    joint = TrainingState(backbone_step=10, head_steps={"classifier": 10, "series_head": 10})
    assert joint.valid_outputs() == ("logits", "feature", "inter", "intra")
    left_behind = TrainingState(backbone_step=20, head_steps={"classifier": 20, "series_head": 10})
    assert left_behind.valid_outputs() == ("logits", "feature")
    assert TrainingState().valid_outputs() == ("feature",)


def test_labels_must_match_the_classifier() -> None:
    with pytest.raises(ConfigError, match="1 labels for a classifier of 2"):
        CheckpointInfo(clip=ClipSpec(), model=ModelSpec(num_classes=2), labels=("a",))


@pytest.mark.parametrize(
    "bad", [{"num_slots": -1}, {"clip_dim": -1}, {"slot_dim": 0}, {"dropout": 1.0}], ids=str
)
def test_impossible_networks_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ModelSpec(**bad)  # type: ignore[arg-type]


def test_bf16_is_a_precision() -> None:
    assert "bf16" in get_args(Precision)
