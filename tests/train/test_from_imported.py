"""Fine-tuning starts from a bundle of an imported model, for other classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import i3d
import pytest
from runs import CLIP, MODEL, equal, finetune_config, state

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import ArtifactError, CheckpointError
from ivdr_deploy.export import from_i3d
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.export.importing import import_model
from train.config import DataConfig
from train.finetune import finetune

SMALL = replace(CLIP, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
I3D = replace(MODEL, backbone="i3d", num_slots=0, clip_dim=0)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    weights = i3d.write_variables(folder / "random.ckpt", i3d.make_variables())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_i3d, "CLIP", SMALL)
        return import_model("i3d-k400", folder / "bundle", weights=weights)[0].path


@pytest.mark.parametrize(
    "kind", ["bundle", "checkpoint", pytest.param("exported again", marks=pytest.mark.exhaustive)]
)
def test_a_linear_probe_keeps_the_imported_backbone_and_says_where_it_came_from(
    imported: Path, data: DataConfig, tmp_path: Path, kind: str
) -> None:
    source = imported / "model.safetensors" if kind == "checkpoint" else imported
    config = finetune_config(
        tmp_path / "run", data, init=str(source), linear_probe=True, clip=SMALL, model=I3D
    )
    path = finetune(config)
    info = load_checkpoint(path).info
    assert info.labels == ("down", "up")
    assert info.training.valid_outputs() == ("logits", "feature")
    assert equal(state(path, "backbone"), state(imported / "model.safetensors", "backbone"))
    assert info.provenance.origin["file"] == "random.ckpt"
    if kind == "exported again":
        export_bundle(path, tmp_path / "exported")
        assert "- file: random.ckpt" in (tmp_path / "exported" / "MODEL_CARD.md").read_text()


def test_dual_heads_that_it_does_not_have_begin_anew(
    imported: Path, data: DataConfig, tmp_path: Path
) -> None:
    model = replace(I3D, num_slots=2, clip_dim=8)
    path = finetune(
        finetune_config(tmp_path, data, init=str(imported), dual_weight=0.1, clip=SMALL, model=model)
    )
    training = load_checkpoint(path).info.training
    assert training.valid_outputs() == ("logits", "feature", "inter", "intra")


def test_another_backbone_or_normalisation_is_named(imported: Path, data: DataConfig, tmp_path: Path) -> None:
    for said, clip, model in (
        (r"model\.backbone: 'i3d' != 'tiny'", SMALL, MODEL),
        (r"clip\.mean", CLIP, I3D),
    ):
        with pytest.raises(CheckpointError, match=said):
            finetune(finetune_config(tmp_path, data, init=str(imported), clip=clip, model=model))


def test_a_folder_that_is_no_bundle_is_refused(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="is not a bundle"):
        finetune(finetune_config(tmp_path / "run", data, init=str(tmp_path / "empty")))
