"""Batches that depend on the seed and the step alone, and lines of the log that stand at the same steps."""

import csv
import itertools
import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import pretrain_config
from torch import nn

from ivdr_deploy.errors import TrainingError
from train import loop
from train.config import DataConfig, OptimConfig
from train.data import Batch
from train.log import RunLog
from train.loop import training_steps
from train.run import start_run
from train.state import TrainState

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


def test_the_order_of_the_videos_depends_on_the_seed() -> None:
    assert [rows for _, rows, _ in steps(0)] != [rows for _, rows, _ in steps(1)]


def test_a_list_shorter_than_a_batch_still_makes_equal_parts() -> None:
    optim = OptimConfig(epochs=1, batch_size=8, accumulate=2)
    (batch,) = training_steps(optim, count=7, seed=0)
    assert [len(batch.part(number, 2).places) for number in range(2)] == [3, 3]


def test_what_is_drawn_differs_between_seeds_steps_places_and_uses() -> None:
    """Each by itself: a draw that left one of them out would come up again."""
    whole, video, seeds = [], [], []
    for seed, step in itertools.product(range(3), repeat=2):
        batch = Batch(rows=np.arange(3), places=np.arange(3), seed=seed, step=step)
        whole.append(batch.whole().random())
        video += [batch.video(place).random() for place in range(3)]
        seeds += [batch.torch_seed(rank) for rank in range(3)]
    assert len({*whole, *video}) == 9 + 27
    assert len(set(seeds)) == 27


def test_every_step_and_process_has_dropout_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Linear(1, 1)
    state = TrainState(
        module=weight, optimizer=torch.optim.SGD(weight.parameters()), seed=0, digest="", epoch_steps=2
    )
    config = pretrain_config(tmp_path, DataConfig(train="unused"), optim=OptimConfig(batch_size=4))
    seen: list[float] = []

    def forward(**batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append(float(torch.rand(())))
        return weight.weight.sum(), {}

    monkeypatch.setattr(loop, "world_size", lambda: 2)
    for rank, step in (*itertools.product(range(2), repeat=2), (0, 0)):
        monkeypatch.setattr(loop, "rank", lambda rank=rank: rank)
        batch = Batch(rows=np.arange(4), places=np.arange(4), seed=0, step=step)
        loop._train(config, forward, state, lambda _: {}, batch)
    *four, again = seen
    assert len(set(four)) == 4
    assert again == four[0]


def test_the_seed_of_a_run_is_that_of_every_source_of_chance(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, DataConfig(train="unused"))
    drawn = []
    for seed in (0, 1, 0):
        start_run(replace(config, seed=seed))
        drawn.append([random.random(), np.random.rand(), float(torch.rand(()))])
    one, other, again = drawn
    assert one == again
    assert not set(one) & set(other)


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


def logged(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def test_a_loss_that_joins_after_the_warm_up_of_the_settings_ends_no_run(tmp_path: Path) -> None:
    """The first steps, as many as the settings say, have a small loss; those after them a large one."""

    def forward(**batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = 50.0 if state.step >= 2 else 1.0
        return 0.0 * weight.weight.sum() + loss, {"loss": torch.tensor(loss)}

    weight = nn.Linear(1, 1)
    for warmup in (2, 0):
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
        state = TrainState(module=weight, optimizer=optimizer, seed=0, digest="", epoch_steps=2)
        config = pretrain_config(tmp_path / str(warmup), DataConfig(train="unused"), on_alarm="stop")
        config = replace(config, dual=replace(config.dual, rank_warmup_steps=warmup))
        Path(config.out).mkdir()
        run = partial(loop.run_steps, config, forward, state, lambda _: {}, count=16, description="test")
        if warmup:
            assert run()["loss"] == 50.0
        else:
            with pytest.raises(TrainingError, match="divergence at step 3: the loss is 50 and was 1"):
                run()


def test_a_line_of_the_log_is_the_mean_over_its_steps(tmp_path: Path) -> None:
    """Of a metric over those that could measure it: with no clip shuffled there is no accuracy of shuffled ones."""
    lost = math.nan
    with RunLog(tmp_path, total_steps=6, every=3) as log:
        for step, (loss, accuracy) in enumerate(
            [(1.0, 0.25), (2.0, lost), (6.0, 0.75), (4.0, lost), (4.0, lost), (7.0, lost)]
        ):
            log.add(step, {"loss": torch.tensor(loss), "swapped_accuracy": accuracy})
    assert [(row["loss"], row["swapped_accuracy"]) for row in logged(tmp_path)] == [
        ("3", "0.5"),
        ("5", "nan"),
    ]
    assert log.last["loss"] == 5.0


def test_one_loss_that_is_not_finite_in_a_line_is_a_divergence(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=3, every=3) as log:
        for step, loss in enumerate((1.0, math.nan)):
            log.add(step, {"loss": loss})
        with pytest.raises(TrainingError, match="the loss is nan at step 3"):
            log.add(2, {"loss": 1.0})
