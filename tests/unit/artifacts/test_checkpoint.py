"""A checkpoint comes back as it was, or is refused with the reason."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ivdr_deploy.artifacts.checkpoint import (
    Checkpoint,
    load_checkpoint,
    read_checkpoint_info,
    save_checkpoint,
)
from ivdr_deploy.errors import CheckpointError, ClipShapeError, ContractMismatchError
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec, Provenance, TrainingState, ViewPlan

CLIP = ClipSpec(num_frames=4, short_side=36, crop_size=32)
INFO = CheckpointInfo(
    clip=CLIP,
    view_plan=ViewPlan(num_clips=3, spatial_crops=3),
    model=ModelSpec(backbone="tiny", num_classes=2),
    labels=("jump", "läuft"),
    training=TrainingState(backbone_step=7, head_steps={"classifier": 7, "series_head": 5}),
    provenance=Provenance(
        seed=3, metrics={"loss": 0.25}, config={"optim": {"lr": 0.1, "milestones": [1, 2]}}
    ),
)
GOLDEN = np.random.default_rng(0).integers(0, 256, (3, *CLIP.clip_shape), dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model=build_model(INFO.model, CLIP), info=INFO, golden=GOLDEN)
    return path


def edit(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Rewrite a checkpoint with ``change(tensors, info)`` applied."""
    tensors = load_file(path)
    values = json.loads(json.dumps(_metadata(path)))
    change(tensors, values)
    save_file(tensors, path, metadata={"ivdr": json.dumps(values)})


def _metadata(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["ivdr"])


def nested(levels: int) -> list[object]:
    """A list in a list in a list."""
    return json.loads("[" * levels + "]" * levels)  # type: ignore[no-any-return]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_comes_back(path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(INFO.model, CLIP).eval()
    loaded = load_checkpoint(path)
    assert isinstance(loaded, Checkpoint)
    assert loaded.info == INFO
    assert np.array_equal(loaded.golden, GOLDEN)
    assert not loaded.model.training
    video = torch.from_numpy(GOLDEN)
    for name, value in model(video).items():
        assert torch.equal(value, loaded.model(video)[name]), name


def test_info_is_read_without_importing_torch(path: Path) -> None:
    code = (
        "import sys; from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info; "
        f"info = read_checkpoint_info({str(path)!r}); print(info.labels[1], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert done.stdout.split() == ["läuft", "False"]


def test_saving_again_replaces_the_file_and_leaves_no_other(path: Path) -> None:
    info = replace(INFO, training=TrainingState(backbone_step=8))
    save_checkpoint(path, model=build_model(INFO.model, CLIP), info=info, golden=GOLDEN)
    assert read_checkpoint_info(path) == info
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_failed_save_keeps_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ClipShapeError):
        save_checkpoint(path, model=build_model(INFO.model, CLIP), info=INFO, golden=GOLDEN[:, :2])
    assert path.read_bytes() == before


def test_expected_contract_is_accepted_or_named_by_field(path: Path) -> None:
    assert load_checkpoint(path, expected_clip=CLIP).info.clip == CLIP
    with pytest.raises(ContractMismatchError, match=r"frame_stride: 4 != 2"):
        load_checkpoint(path, expected_clip=replace(CLIP, frame_stride=2))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_file_cut_short_is_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a readable .safetensors file" in refusal(path)


def test_other_safetensors_files_are_refused(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)
    assert "not a checkpoint of ivdr_deploy" in refusal(path)


def test_newer_format_is_refused_by_number(path: Path) -> None:
    edit(path, lambda _, info: info.update(format_version=99))
    assert "format version 99, this ivdr reads 1 to 2" in refusal(path)


def test_unknown_metadata_is_refused_by_key(path: Path) -> None:
    edit(path, lambda _, info: info["clip"].update(zoom=2))
    assert "'zoom'" in refusal(path)


def test_missing_weight_is_refused_by_name(path: Path) -> None:
    edit(path, lambda tensors, _: tensors.pop("model.classifier.linear.bias"))
    assert "classifier.linear.bias" in refusal(path)


def test_weight_of_another_shape_is_refused_by_name(path: Path) -> None:
    edit(path, lambda tensors, _: tensors.update({"model.classifier.linear.bias": torch.zeros(3)}))
    assert "classifier.linear.bias" in refusal(path)


def test_extra_tensor_is_refused(path: Path) -> None:
    edit(path, lambda tensors, _: tensors.update(other=torch.zeros(3)))
    assert "neither weights nor golden clips" in refusal(path)


def test_unknown_backbone_is_refused_by_name(path: Path) -> None:
    edit(path, lambda _, info: info["model"].update(backbone="huge"))
    assert "unknown backbone 'huge'" in refusal(path)


def test_missing_or_foreign_golden_clips_are_refused(path: Path) -> None:
    edit(
        path,
        lambda tensors, _: tensors.update({"golden.video": torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8)}),
    )
    assert "golden clips have dtype uint8 and shape (1, 4, 8, 8, 3)" in refusal(path)
    edit(path, lambda tensors, _: tensors.pop("golden.video"))
    assert "no golden clips" in refusal(path)


def test_golden_clips_of_another_kind_of_number_are_refused(path: Path) -> None:
    edit(
        path, lambda tensors, _: tensors.update({"golden.video": tensors["golden.video"].to(torch.bfloat16)})
    )
    assert "does not fit its own description" in refusal(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", "[" * 100_000, '{"format_version": 2, "clip": ' + "[" * 500 + "]" * 500 + "}"],
    ids=["empty", "list", "number", "nothing", "deep", "deeper"],
)
def test_a_description_that_is_none_is_refused(path: Path, text: str) -> None:
    save_file(load_file(path), path, metadata={"ivdr": text})
    message = refusal(path)
    assert path.name in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda info: info["clip"].update(mean=[float("nan")] * 3), "JSON does not have"),
        (lambda info: info["provenance"]["metrics"].update(loss=float("inf")), "JSON does not have"),
        (lambda info: info["provenance"]["config"]["optim"].update(lr=float("nan")), "JSON does not have"),
        (lambda info: info["model"]["backbone_config"].update(eps=[-float("inf")]), "JSON does not have"),
        (lambda info: info["provenance"]["config"].update(deep=nested(200)), "deeper than 100 levels"),
        (lambda info: info["model"]["backbone_config"].update(deep=nested(200)), "deeper than 100 levels"),
        (lambda info: info["view_plan"].update(num_clips=0), "num_clips"),
        (lambda info: info.update(labels=["one"]), "1 labels for a classifier of 2"),
    ],
    ids=["nan", "metric", "setting", "backbone", "deep", "deep backbone", "plan", "labels"],
)
def test_a_description_of_something_impossible_is_refused(path: Path, change, word: str) -> None:
    edit(path, lambda _, info: change(info))
    assert word in refusal(path)


def test_a_network_without_slots_or_clip_head_comes_back(tmp_path: Path) -> None:
    info = replace(
        INFO,
        model=ModelSpec(backbone="tiny", num_slots=0, clip_dim=0, num_classes=2),
        training=TrainingState(backbone_step=7, head_steps={"classifier": 7}),
    )
    path = tmp_path / "bare.safetensors"
    save_checkpoint(path, model=build_model(info.model, CLIP), info=info, golden=GOLDEN)
    loaded = load_checkpoint(path)
    assert loaded.info == info
    assert set(loaded.model(torch.from_numpy(GOLDEN))) == {"feature", "logits"}
