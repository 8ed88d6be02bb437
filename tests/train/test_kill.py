"""A run that is killed at any moment, and started again by the same command, ends as if nothing had been."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import finish, start
from runs import HEADS, equal, pretrain_config, state

from train import loop
from train.config import DataConfig, OptimConfig, PretrainConfig
from train.method import DualConfig
from train.pretrain import pretrain
from train.state import saved_states

RUN = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from test_kill import settings
from ivdr_deploy._console import exiting
from train import loop
from train.pretrain import pretrain
loop.SAVE_SECONDS = 0.0
out, train, cache, form, last = sys.argv[1:]
take, go_on = loop._train, Path(out + ".go-on")

def held(config, forward, state, draw, batch):
    while batch.step == int(last) and not go_on.exists():
        time.sleep(0.002)
    return take(config, forward, state, draw, batch)

loop._train = held
config = settings(Path(out), train, cache, form)
with exiting("train"):
    pretrain(config)
"""
STEPS = 16
"""A run waits before a step that it is told, so that it has not ended when what is to happen to it comes late."""

SELDOM = RUN.replace("loop.SAVE_SECONDS = 0.0\n", "").replace(", form)", ", form, log_every=3)")
"""The same, with a line for every third step, and a state only at the end."""


def settings(out: Path, train: str, cache: str, form: str, **fields: object) -> PretrainConfig:
    return pretrain_config(
        out,
        DataConfig(train=train, cache=cache),
        optim=OptimConfig(name="adamw", lr=1e-3, epochs=8, batch_size=8, schedule="cosine"),
        dual=DualConfig(form=form, queue_length=20),  # type: ignore[arg-type]
        **fields,
    )


def begin(
    code: str, out: Path, data: DataConfig, form: str, processes: int = 1, *, last: int = STEPS
) -> list[subprocess.Popen[str]]:
    return start(code, str(out), data.train, data.cache, form, str(last), processes=processes)


def run(out: Path, data: DataConfig, form: str, processes: int) -> None:
    """Train to the end: here, which is quicker than in a process of its own, where one process is enough."""
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "SAVE_SECONDS", 0.0)
            pretrain(settings(out, data.train, data.cache, form))
        return
    for code, error in finish(begin(RUN, out, data, form, processes)):
        assert code == 0, error


def run_and_kill(out: Path, data: DataConfig, form: str, processes: int, *, after: int, late: float) -> int:
    """Kill every process some time after a step was saved; return the newest step that is left."""
    last = min(max(newest(out), after) + 4, STEPS - 1)
    started = begin(RUN, out, data, form, processes, last=last)
    while newest(out) < after:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.002)
    time.sleep(late)  # into whatever it is at
    for process in started:
        process.kill()
    finish(started)
    return newest(out)


def newest(out: Path) -> int:
    found = saved_states(out)
    return int(found[0].stem.partition("-")[2]) if found else -1


@pytest.mark.parametrize(
    ("form", "processes", "kills"),
    [
        ("simclr", 1, 1),
        pytest.param("simclr", 1, 5, marks=pytest.mark.exhaustive),
        pytest.param("moco", 1, 5, marks=pytest.mark.exhaustive),
        pytest.param("moco", 2, 5, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_runs_end_bitwise_like_one_that_was_not(
    data: DataConfig, tmp_path: Path, form: str, processes: int, kills: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, data, form, processes)
    chance = random.Random()
    seen = []
    for kill in range(kills):
        after = kill * (STEPS - 4) // kills + chance.randint(0, 2)
        late = chance.uniform(0.0, 0.1)
        seen.append(run_and_kill(cut, data, form, processes, after=after, late=late))
    assert max(seen) < STEPS, f"it ended before it was killed: {seen}"
    run(cut, data, form, processes)
    for part in ("backbone", *HEADS[:2]):
        one, two = (state(folder / "checkpoint.safetensors", part) for folder in (whole, cut))
        assert equal(one, two), f"{part} after kills at {seen}"
    assert (whole / "metrics.csv").read_text() == (cut / "metrics.csv").read_text()
    assert newest(cut) == STEPS
    assert len(saved_states(cut)) == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)],
)
def test_a_run_that_is_asked_to_stop_keeps_its_step(
    data: DataConfig, tmp_path: Path, number: int, code: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, data, "simclr", 1)
    (process,) = begin(SELDOM, cut, data, "simclr", last=7)
    lines = cut / "metrics.csv"
    while not lines.is_file() or len(lines.read_text().splitlines()) < 2:
        assert process.poll() is None, finish([process])
        time.sleep(0.002)
    process.send_signal(number)
    cut.with_name("cut.go-on").touch()
    ((ended, said),) = finish([process])

    assert ended == code, said
    assert "stopping when this step is done" in said
    reached = newest(cut)
    assert 3 <= reached <= 8
    assert int(lines.read_text().splitlines()[-1].split(",")[0]) == reached, "the line of the step is there"
    pretrain(settings(cut, data.train, data.cache, "simclr", log_every=3))
    for part in ("backbone", *HEADS[:2]):
        one, two = (state(folder / "checkpoint.safetensors", part) for folder in (whole, cut))
        assert equal(one, two), part
