from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.spec import (
    ArtifactManifest,
    CheckpointInfo,
    ClipSpec,
    ModelSpec,
    TrainingState,
    canonical_json,
)


def test_contract_hash_is_pinned() -> None:
    """A change of this value makes every artifact in the world refuse its neighbours: never by accident."""
    assert ClipSpec().contract_hash == "01074ed2e6731a9f353eb6fc9022bafb23fac9c96a79991ad75456a4fc1d4609"


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 8},
        {"frame_stride": 2},
        {"target_fps": 25.0},
        {"num_clips": 5},
        {"short_side": 144},
        {"crop_size": 96},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
    ],
)
def test_every_field_of_the_contract_changes_its_hash(change: dict[str, object]) -> None:
    changed = replace(ClipSpec(), **change)
    assert changed.contract_hash != ClipSpec().contract_hash
    (difference,) = ClipSpec().differences(changed)
    assert difference.startswith(next(iter(change)))


def test_contract_hash_does_not_depend_on_how_a_number_was_written() -> None:
    written = from_dict(ClipSpec, json.loads('{"target_fps": 25}'), where="test")
    assert written.contract_hash == ClipSpec(target_fps=25.0).contract_hash


@pytest.mark.parametrize(
    "bad",
    [
        {"num_frames": 0},
        {"frame_stride": 0},
        {"num_clips": 0},
        {"crop_size": 129},
        {"target_fps": 0.0},
        {"std": (0.1, 0.0, 0.1)},
    ],
)
def test_impossible_contracts_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad)).split("_")[0]):
        ClipSpec(**bad)  # type: ignore[arg-type]


def test_a_head_is_valid_only_up_to_the_last_change_of_the_backbone() -> None:
    joint = TrainingState(backbone_step=10, head_steps={"classifier": 10, "series_head": 10})
    assert joint.valid_outputs() == ("logits", "feature", "inter", "intra")
    left_behind = TrainingState(backbone_step=20, head_steps={"classifier": 20, "series_head": 10})
    assert left_behind.valid_outputs() == ("logits", "feature")
    assert TrainingState().valid_outputs() == ("feature",)


def test_labels_must_match_the_classifier() -> None:
    with pytest.raises(ConfigError, match="1 labels for a classifier of 2"):
        CheckpointInfo(clip=ClipSpec(), model=ModelSpec(num_classes=2), labels=("a",))


def test_a_manifest_whose_contract_was_edited_is_refused() -> None:
    clip = ClipSpec()
    manifest = ArtifactManifest(
        name="a",
        version="1",
        clip=clip,
        contract_hash=clip.contract_hash,
        model=ModelSpec(),
        labels=(),
        outputs=(),
        training=TrainingState(),
        files=(),
        ivdr_version="0.1.0",
    )
    values = to_dict(manifest)
    assert from_dict(ArtifactManifest, json.loads(canonical_json(values)), where="test") == manifest
    values["clip"]["short_side"] = 144
    with pytest.raises(ConfigError, match="contract hash"):
        from_dict(ArtifactManifest, values, where="manifest.json")
