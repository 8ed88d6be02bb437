"""Batches that depend on the seed and the step alone, and lines of the log that stand at the same steps."""

import csv
from pathlib import Path

import numpy as np
import pytest

from train.config import OptimConfig
from train.data import Batch
from train.log import RunLog
from train.loop import training_steps

OPTIM = OptimConfig(epochs=3, batch_size=4)


def steps(seed: int) -> list[tuple[int, list[int], float]]:
    taken = training_steps(OPTIM, count=9, seed=seed)
    return [seen(batch) for batch in taken]


def seen(batch: Batch) -> tuple[int, list[int], float]:
    return batch.step, batch.own_rows.tolist(), batch.whole().random() + batch.video(0).random()


def test_steps_repeat_for_a_seed_and_differ_between_seeds_epochs_and_steps() -> None:
    one = steps(0)
    assert one == steps(0)
    assert one != steps(1)
    assert [step for step, _, _ in one] == list(range(6))
    assert len({tuple(rows) for _, rows, _ in one}) == 6
    assert len({drawn for _, _, drawn in one}) == 6


@pytest.mark.parametrize("start", range(7))
def test_steps_from_the_middle_are_those_of_the_whole_run(start: int) -> None:
    rest = training_steps(OPTIM, count=9, seed=0, start=start)
    assert [seen(batch) for batch in rest] == steps(0)[start:]


def test_a_log_that_has_lost_lines_goes_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a loss of power: the state was flushed to disk, and the log was not."""
    with RunLog(tmp_path, total_steps=3, every=1) as log:
        for step in range(2):
            log.add(step, {"loss": 1.0})
        position = log.position
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-4])
    with RunLog(tmp_path, total_steps=3, every=1, position=position) as log:
        assert "has lost lines" in capsys.readouterr().err
        log.add(2, {"loss": 2.0})
    assert b"\0" not in path.read_bytes()
    path.unlink()
    with RunLog(tmp_path, total_steps=3, every=1, position=position) as log:
        log.add(2, {"loss": 2.0})
    assert path.read_text().splitlines() == ["step,loss", "3,2"]


def test_neither_order_nor_draws_depend_on_the_global_state_of_numpy() -> None:
    np.random.seed(1)
    one = steps(0)
    np.random.seed(2)
    assert one == steps(0)


def test_lines_of_the_log_stand_at_the_same_steps_after_a_line_that_was_asked_for(tmp_path: Path) -> None:
    """As where a run was asked to stop between two lines, and went on."""
    taken: list[int] = []
    position = 0
    for steps, last in ((range(0, 5), 4), (range(5, 11), -1)):
        with RunLog(tmp_path, total_steps=11, every=3, position=position) as log:
            for step in steps:
                if log.add(step, {"loss": 1.0}, now=step == last):
                    taken.append(step + 1)
            position = log.position
    assert taken == [3, 5, 6, 9, 11]
    table = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    assert [int(row["step"]) for row in table] == taken
