"""Measuring while training goes on: it changes nothing, keeps the best, ends early, and survives a stop."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from runs import equal, finetune_config, rewrite, state

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import ConfigError, DataError, FolderError
from train import loop, validation
from train.config import DataConfig, OptimConfig
from train.evaluate import evaluate
from train.finetune import finetune
from train.run_page import VALIDATION_NAME
from train.validation import BEST_NAME, read_rows

OPTIM = OptimConfig(name="adamw", lr=1e-3, epochs=4, batch_size=8, schedule="cosine")


@pytest.fixture
def held(data: DataConfig) -> DataConfig:
    return replace(data, test="", validation=data.test)


def test_measuring_changes_no_weight_and_the_best_is_kept(
    held: DataConfig, data: DataConfig, tmp_path: Path
) -> None:
    with_it = finetune(finetune_config(tmp_path / "a", held, optim=OPTIM))
    without = finetune(finetune_config(tmp_path / "b", replace(data, test=""), optim=OPTIM))
    for part in ("backbone", "classifier"):
        assert equal(state(with_it, part), state(without, part))
    rows = read_rows(tmp_path / "a" / VALIDATION_NAME)
    assert [row.step for row in rows] == [2, 4, 6, 8]
    best = load_checkpoint(tmp_path / "a" / BEST_NAME)
    top = max(rows, key=lambda row: (row.video_accuracy, -row.step))
    assert best.info.provenance.metrics["best_step"] == top.step
    assert best.info.training.backbone_step == top.step
    assert evaluate(tmp_path / "a" / BEST_NAME, data.test).video_accuracy.value == top.video_accuracy
    assert "validation video_accuracy" in (tmp_path / "a" / "page.html").read_text()


def test_the_page_is_there_at_the_first_measurement(
    held: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = replace(OPTIM, epochs=2)
    config = finetune_config(tmp_path / "a", held, optim=optim)

    def stop(*args: object, **options: object) -> None:
        if len(read_rows(tmp_path / "a" / VALIDATION_NAME)) == 2:
            raise KeyboardInterrupt
        return written(*args, **options)  # type: ignore[arg-type]

    written = validation.write_run_page
    monkeypatch.setattr(validation, "write_run_page", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    text = (tmp_path / "a" / "page.html").read_text()
    assert "step 2 of 4" in text
    assert "Accuracy by class" in text
    monkeypatch.undo()
    path = finetune(config)  # goes on, and drops what it measures again
    whole = finetune(finetune_config(tmp_path / "b", held, optim=optim))
    assert equal(state(path, "backbone"), state(whole, "backbone"))
    assert read_rows(tmp_path / "a" / VALIDATION_NAME) == read_rows(tmp_path / "b" / VALIDATION_NAME)


SLOW = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("log_every", "stop", "epochs"),
    [(1, 2, 2), pytest.param(1, 4, 2, marks=SLOW), pytest.param(3, 4, 4, marks=SLOW)],
    ids=["at a measurement", "at the last one", "between two lines"],
)
def test_a_run_that_is_asked_to_stop_is_measured_at_the_steps_at_which_it_would_have_been(
    held: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int, stop: int, epochs: int
) -> None:
    take = loop._train

    def asked(*given: object) -> object:
        if given[-1].step + 1 == stop:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGINT)
        return take(*given)  # type: ignore[arg-type]

    optim = replace(OPTIM, epochs=epochs)
    config = finetune_config(tmp_path / "a", held, optim=optim, log_every=log_every)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train", asked)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    finetune(config)
    finetune(replace(config, out=str(tmp_path / "b")))
    names = (VALIDATION_NAME, BEST_NAME)
    rows, best = ([tmp_path / run / name for run in "ab"] for name in names)
    assert read_rows(rows[0]) == read_rows(rows[1])
    assert equal(state(best[0], "backbone"), state(best[1], "backbone"))


def test_training_ends_early_when_nothing_gets_better(
    held: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = replace(OPTIM, lr=0.0, epochs=20)
    config = finetune_config(tmp_path / "a", held, optim=still, patience=2, validate_every=0.5)
    path = finetune(config)
    steps = load_checkpoint(path).info.training.backbone_step
    rows = read_rows(tmp_path / "a" / VALIDATION_NAME)
    best = max(rows, key=lambda row: (row.video_accuracy, -row.step))
    assert steps == rows[-1].step == best.step + 2 < 40
    assert "ends early: no better in 2 measurements" in capsys.readouterr().err
    with pytest.raises(FolderError, match="ended early"):
        finetune(config)
    path.unlink()  # as if it had been stopped before its checkpoint was written
    assert load_checkpoint(finetune(config)).info.training.backbone_step == steps


def test_rows_of_steps_that_are_taken_again_are_dropped(held: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    rows = [validation.Row(step, 1.0, 0.5, 1.0, 1.0) for step in (2, 4)]
    validation.write_rows(tmp_path / "a" / VALIDATION_NAME, rows)
    finetune(finetune_config(tmp_path / "a", held, optim=replace(OPTIM, epochs=1)))
    assert [row.step for row in read_rows(tmp_path / "a" / VALIDATION_NAME)] == [2]


def test_measurements_on_another_list_are_not_mixed(held: DataConfig, tmp_path: Path) -> None:
    config = finetune_config(tmp_path / "a", held, optim=replace(OPTIM, epochs=2))
    finetune(config)
    (tmp_path / "a" / "checkpoint.safetensors").unlink()  # as if it had been stopped before
    other = Path(held.validation).with_name("shorter.csv")
    other.write_text("\n".join(Path(held.validation).read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(FolderError, match=r"so far, 6 videos; data.validation is now '.*', 5 videos"):
        finetune(replace(config, data=replace(held, validation=str(other))))
    (tmp_path / "a" / VALIDATION_NAME).write_text("step,video_accuracy\n2,high\n")
    with pytest.raises(FolderError, match="does not hold the measurements of a run any more"):
        finetune(config)


def test_a_list_with_an_unknown_class_is_refused(held: DataConfig, tmp_path: Path) -> None:
    other = rewrite(held.validation, tmp_path / "v.csv", down0="sideways")
    with pytest.raises(DataError, match="unknown to training: sideways"):
        finetune(finetune_config(tmp_path / "a", replace(held, validation=other.test)))


def test_a_linear_probe_has_nothing_to_validate(held: DataConfig, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fitted in one go"):
        finetune_config(tmp_path, held, init=str(pretrained), linear_probe=True)
