"""The harness that says what pre-training is worth: equal shares, honest intervals, and nothing measured twice."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint

from examples.training import __main__ as harness
from examples.training.measure import measure, trained_as
from examples.training.methods import METHODS, DataSet, figures, pretrain_config
from examples.training.report import mean_and_half_width, render
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.errors import FolderError
from ivdr_deploy.records import to_dict


def data_set(folder: Path) -> DataSet:
    return DataSet(
        name="x", train=folder / "train.csv", test=folder / "test.csv", epochs=6, finetune_epochs=2
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_encodes_as_many_clips(name: str, tmp_path: Path) -> None:
    config = pretrain_config(METHODS[name], data_set(tmp_path), tmp_path / "a" / "b" / "c", seed=3)
    per_step = config.dual.clips_per_video if METHODS[name].kind == "pretrain" else METHODS[name].clips
    assert per_step == METHODS[name].clips
    if METHODS[name].kind != "random":
        assert config.optim.epochs * per_step == 6 * 4
    assert config.seed == 3


def test_the_fair_baseline_has_the_norm_and_the_recipe_is_the_preset(tmp_path: Path) -> None:
    found = {
        name: pretrain_config(METHODS[name], data_set(tmp_path), tmp_path / "a" / "b" / "c", seed=0)
        for name in ("clip, norm", "clip-sr-tc (ivdr)", "clip-sr-tc (paper)")
    }
    assert found["clip, norm"].model.head_norm == "both"
    assert found["clip, norm"].dual.mode == "clip"
    assert (found["clip-sr-tc (ivdr)"].model.head_norm, found["clip-sr-tc (ivdr)"].dual.rank_clamp) == (
        "series",
        0.0,
    )
    assert (found["clip-sr-tc (paper)"].model.head_norm, found["clip-sr-tc (paper)"].dual.rank_clamp) == (
        "none",
        5.0,
    )


def test_intervals_are_students_over_seeds() -> None:
    mean, half = mean_and_half_width([0.1, 0.2, 0.3, 0.4, 0.5])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(2.776 * math.sqrt(0.025) / math.sqrt(5))
    assert math.isnan(mean_and_half_width([0.4])[1])


def test_differences_are_taken_seed_by_seed() -> None:
    values = {"set": {"probe": {"clip, norm": [0.2, 0.4, 0.6], "clip-sr-tc (ivdr)": [0.3, 0.5, 0.7]}}}
    page = render(values, how="how")
    assert "| clip, norm | 3 | 0.400 ± 0.497 |" in page
    assert "| clip, norm | +10.0 ± 0.0 |" in page  # the spread over seeds is common to both


def test_a_training_that_ended_under_other_settings_is_not_taken(tmp_path: Path) -> None:
    config = pretrain_config(METHODS["clip"], data_set(tmp_path), tmp_path / "a" / "b" / "c", seed=0)
    made = load_checkpoint(make_tiny_checkpoint(Path(config.out) / "checkpoint.safetensors"))
    with pytest.raises(FolderError, match="other settings"):
        trained_as(config)
    provenance = replace(made.info.provenance, config=to_dict(config))
    info = replace(made.info, provenance=provenance)
    path = Path(config.out) / "checkpoint.safetensors"
    save_checkpoint(path, model=made.model, info=info, golden=made.golden)
    assert trained_as(config) == path


@pytest.mark.exhaustive
def test_a_seed_is_measured_once_and_what_is_written_is_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = figures(tmp_path / "figures" / "videos", epochs=1, train_actors=3, test_actors=2)
    names = ["random", "clip, norm", "clip-sr-tc (ivdr)"]
    harness.run([data], names, seeds=1, work=tmp_path, out=tmp_path / "out")
    values = json.loads((tmp_path / "out" / "training.json").read_text())["figures"]
    assert values.keys() == {"R@1", "probe", "order pairs", "fine-tune", "ranking", "ranking, shuffled"}
    assert values["probe"].keys() == set(names)
    assert values["ranking"].keys() == {"clip-sr-tc (ivdr)"}
    assert all(0.0 <= value <= 1.0 for by in values.values() for seeds in by.values() for value in seeds)

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("examples.training.measure.pretrain", never)
    monkeypatch.setattr("examples.training.measure.finetune", never)
    harness.run([data], names, seeds=1, work=tmp_path, out=tmp_path / "again")
    again = json.loads((tmp_path / "again" / "training.json").read_text())
    assert again["figures"] == values
    other = figures(tmp_path / "figures" / "videos", epochs=2)
    longer = replace(data, finetune_epochs=3)
    for changed in (other, longer):
        with pytest.raises(FolderError, match="other settings"):
            measure("random", METHODS["random"], changed, tmp_path / "figures" / "random" / "0", seed=0)
