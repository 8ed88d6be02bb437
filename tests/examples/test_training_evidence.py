"""The harness that says what pre-training is worth: equal shares, honest intervals, and nothing measured twice."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint

from examples.training import __main__ as harness
from examples.training.measure import FEATURES, FEW, FINE_TUNE, RESULTS, measured, parts_of, trained_as
from examples.training.methods import METHODS, DataSet, Unit, figures, pretrain_config, real
from examples.training.report import mean_and_half_width, render
from examples.training.units import side_by_side
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import FolderError, IvdrError
from ivdr_deploy.records import to_dict


def unit_of(folder: Path, method: str, *, seed: int = 0) -> Unit:
    data = DataSet(
        name="x", train=folder / "train.csv", test=folder / "test.csv", epochs=6, finetune_epochs=2
    )
    return Unit(method=method, data=data, folder=folder / "a" / "b" / "c", seed=seed)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_encodes_as_many_clips(name: str, tmp_path: Path) -> None:
    config = pretrain_config(unit_of(tmp_path, name, seed=3))
    per_step = config.dual.clips_per_video if METHODS[name].kind == "pretrain" else METHODS[name].clips
    assert per_step == METHODS[name].clips
    if METHODS[name].kind != "random":
        assert config.optim.epochs * per_step == 6 * 4
    assert config.seed == 3


def test_the_fair_baseline_has_the_norm_and_the_recipe_is_the_preset(tmp_path: Path) -> None:
    fair, recipe, paper = (
        pretrain_config(unit_of(tmp_path, name))
        for name in ("clip, norm", "clip-sr-tc (ivdr)", "clip-sr-tc (paper)")
    )
    assert (fair.model.head_norm, fair.dual.mode) == ("both", "clip")
    assert (recipe.model.head_norm, recipe.dual.rank_clamp) == ("series", 0.0)
    assert (paper.model.head_norm, paper.dual.rank_clamp) == ("none", 5.0)


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
    config = pretrain_config(unit_of(tmp_path, "clip"))
    made = load_checkpoint(make_tiny_checkpoint(Path(config.out) / "checkpoint.safetensors"))
    with pytest.raises(FolderError, match="other settings"):
        trained_as(config)
    provenance = replace(made.info.provenance, config=to_dict(config))
    info = replace(made.info, provenance=provenance)
    path = Path(config.out) / "checkpoint.safetensors"
    save_checkpoint(path, model=made.model, info=info, golden=made.golden)
    assert trained_as(config) == path


def keep(unit: Unit, value: float) -> None:
    """Keep what was found, as ``measure`` does."""
    unit.folder.mkdir(parents=True, exist_ok=True)
    found = {
        part: {"made_with": settings, "values": {"probe" if part == FEATURES else part: value}}
        for part, settings in parts_of(unit).items()
    }
    (unit.folder / RESULTS).write_text(json.dumps(found))


@pytest.fixture
def lists(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("path,label\na.mp4,walk\n")


@pytest.mark.usefixtures("lists")
def test_values_end_before_the_first_that_is_missing_so_that_seeds_stand_in_line(tmp_path: Path) -> None:
    data = unit_of(tmp_path, "clip").data
    sets = [data, replace(data, name="y")]
    units = harness.units_of(sets, ["clip", "clip, norm"], seeds=2, work=tmp_path)
    for number in (0, 2, 3, 4):  # seed 0 of the second method is still trained
        keep(units[number], number / 10)
    harness.write(units, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    assert {name: by["probe"] for name, by in found.items()} == {"x": {"clip": [0.0]}, "y": {"clip": [0.4]}}
    keep(units[1], 0.1)
    harness.write(units, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    assert found["x"]["probe"] == {"clip": [0.0, 0.2], "clip, norm": [0.1, 0.3]}
    page = (tmp_path / "out" / "training.md").read_text()
    assert "Training and test videos: `x` 1 and 1; `y` 1 and 1." in page


def test_what_was_found_under_other_settings_is_not_taken(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "random")
    assert measured(unit) is None
    keep(unit, 0.5)
    assert measured(unit) == {"probe": 0.5, FINE_TUNE: 0.5}
    for data in (replace(unit.data, epochs=7), replace(unit.data, finetune_epochs=3)):
        with pytest.raises(FolderError, match="other settings"):
            measured(replace(unit, data=data))


def test_a_part_that_is_new_makes_a_unit_unfinished_and_takes_nothing_from_the_others(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "random")
    keep(unit, 0.5)
    more = replace(unit, data=replace(unit.data, few=tmp_path / "few.csv", few_epochs=4))
    assert measured(more) is None
    keep(more, 0.25)
    assert measured(more) == {"probe": 0.25, FINE_TUNE: 0.25, FEW: 0.25}
    with pytest.raises(FolderError, match="few labels was made with other settings"):
        measured(replace(more, data=replace(more.data, few_epochs=5)))
    assert FEW not in parts_of(replace(more, method="supervised"))


def test_few_labels_are_those_of_some_people_and_of_every_class(tmp_path: Path) -> None:
    data = figures(tmp_path / "videos", epochs=1, train_actors=6, test_actors=1)
    assert data.few is not None
    few, whole = (read_video_list(path) for path in (data.few, data.train))
    assert (len(few.items), len(whole.items), few.labels) == (30, 36, whole.labels)
    assert {item.path.resolve() for item in few.items} < {item.path.resolve() for item in whole.items}
    assert len({item.path.name for item in few.items}) == 5


def test_a_unit_that_fails_ends_the_whole_and_says_why(tmp_path: Path) -> None:
    unit = replace(unit_of(tmp_path, "random"), folder=tmp_path / "x" / "random" / "0")
    (tmp_path / "train.csv").mkdir(parents=True)  # a list that cannot be read
    with pytest.raises(
        IvdrError, match=r"x, random, seed 0: .*exit code \d+; .*log.txt ends with: .*train.csv"
    ):
        list(side_by_side([unit], at_once=1))


def test_real_clips_are_those_of_the_lists(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVDR_TEST_DATA", str(shared_data))
    found = {one.name: one for one in real(tmp_path, epochs=2)}
    assert list(found) == ["weizmann", "dark"]
    sizes = {
        name: [len(read_video_list(path).items) for path in (one.train, one.test)]
        for name, one in found.items()
    }
    assert sizes == {"weizmann": [60, 20], "dark": [63, 33]}
    assert set(found["dark"].pairs[0]) < set(read_video_list(found["dark"].train).labels)


@pytest.mark.exhaustive
def test_units_are_measured_once_and_what_is_written_is_what_was_found(tmp_path: Path) -> None:
    data = figures(tmp_path / "figures" / "videos", epochs=1, train_actors=3, test_actors=2)
    names = ["random", "clip, norm", "clip-sr-tc (ivdr)"]
    units = harness.units_of([data], names, seeds=1, work=tmp_path)
    harness.run(units, work=tmp_path, out=tmp_path / "out", at_once=2)
    values = json.loads((tmp_path / "out" / "training.json").read_text())["figures"]
    pairs = {"raise_arms or lower_arms", "sit_down or stand_up"}
    assert (
        values.keys()
        == {"R@1", "probe", "order pairs", "fine-tune", "few labels", "ranking", "ranking, shuffled"} | pairs
    )
    assert values["probe"].keys() == set(names)
    assert values["ranking"].keys() == {"clip-sr-tc (ivdr)"}
    assert all(0.0 <= value <= 1.0 for by in values.values() for seeds in by.values() for value in seeds)
    for name in names:
        both = [values[pair][name][0] for pair in pairs]
        assert values["order pairs"][name][0] == pytest.approx(sum(both) / 2)
    before = [(unit.folder / RESULTS).stat().st_mtime_ns for unit in units]
    harness.run(units, work=tmp_path, out=tmp_path / "again", at_once=2)
    assert [(unit.folder / RESULTS).stat().st_mtime_ns for unit in units] == before
    assert json.loads((tmp_path / "again" / "training.json").read_text())["figures"] == values
