from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.demo.figures import ACTIONS, FPS, HEIGHT, WIDTH, Actor, make_figures, render
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video.clips import load_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("figures") / "data"
    make_figures(target, train_actors=2, test_actors=1, seed=3)
    return target


def test_lists_hold_every_action_of_every_actor_and_no_actor_is_in_both(folder: Path) -> None:
    train, test = (read_video_list(folder / f"{split}.csv") for split in ("train", "test"))
    assert train.labels == test.labels == tuple(sorted(ACTIONS))
    assert (len(train.items), len(test.items)) == (12, 6)
    actors = [{item.path.stem for item in videos.items} for videos in (train, test)]
    assert not actors[0] & actors[1]


def test_files_are_real_videos(folder: Path) -> None:
    info = load_clips(folder / "wave" / "actor00.mp4", ClipSpec(), ViewPlan(num_clips=1)).info
    assert (info.width, info.height, info.fps, info.codec) == (WIDTH, HEIGHT, FPS, "h264")


def test_the_same_seed_gives_the_same_files_and_another_gives_others(folder: Path, tmp_path: Path) -> None:
    make_figures(tmp_path / "same", train_actors=1, test_actors=1, seed=3)
    make_figures(tmp_path / "other", train_actors=1, test_actors=1, seed=4)
    name = "sit_down/actor00.mp4"
    assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


@pytest.mark.parametrize(("forward", "backward"), [("sit_down", "stand_up"), ("raise_arms", "lower_arms")])
def test_pairs_differ_only_in_the_order_of_time(forward: str, backward: str) -> None:
    assert ACTIONS[forward].pose is ACTIONS[backward].pose
    assert (ACTIONS[forward].reversed, ACTIONS[backward].reversed) == (False, True)
    actor = Actor.random(np.random.default_rng(0))
    there, back = (
        render(ACTIONS[name], actor, np.random.default_rng(5)).astype(float) for name in (forward, backward)
    )
    still = np.abs(there[0] - there[-1]).mean()  # start and end pose differ
    assert np.abs(there[0] - back[-1]).mean() < still
    assert np.abs(there[-1] - back[0]).mean() < still
