"""Several scoring processes on one run: the rows of a single one, and each of them works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hostile_sources import KillsTheScorer, SaysWhoDecodes, with_hostile
from score_tables import TIMINGS
from videos import numbered_video

from ivdr_deploy.datasets.lists import VideoList, VideoStream, read_video_list
from ivdr_deploy.environment import only_gpu
from ivdr_deploy.errors import ConfigError, DataError, DeviceError
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.plan import ScoreOptions
from ivdr_deploy.scoring.scorer import score_with
from ivdr_deploy.scoring.several import Several
from ivdr_deploy.scoring.supervisor import Supervisor
from ivdr_deploy.scoring.task import Task, parse_devices

pytestmark = pytest.mark.usefixtures("workers_find_the_tests")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> VideoList:
    folder = tmp_path_factory.mktemp("videos")
    for index in range(24):
        numbered_video(folder / f"{index:02d}.mp4", num_frames=8 + index % 3, size=(64, 48))
    return read_video_list(folder)


def score_by(engine: Supervisor | Several, videos: VideoList | VideoStream, out: Path) -> list[dict]:
    with engine:
        score_with(engine, InputStream(videos, Selection()), out, videos_per_shard=2)
    return read_scores(out).drop_columns([*TIMINGS, "input_key"]).to_pylist()


def test_all_of_them_work_and_give_the_rows_of_one(task: Task, videos: VideoList, tmp_path: Path) -> None:
    watched = videos
    for place, item in enumerate(videos.items):
        watched = with_hostile(watched, place, SaysWhoDecodes(log=tmp_path / "log", good=item.path))

    rows = score_by(Several([task, task]), watched, tmp_path / "two")

    assert rows == score_by(Supervisor(task), watched, tmp_path / "one")
    two = (tmp_path / "log").read_text().splitlines()[: len(videos.items)]
    assert len({line.split()[0] for line in two}) == 2, "one of the two did nothing"


def test_an_input_that_kills_one_of_them_is_one_row(task: Task, videos: VideoList, tmp_path: Path) -> None:
    rows = score_by(Several([task, task]), with_hostile(videos, 5, KillsTheScorer()), tmp_path / "out")

    assert [place for place, row in enumerate(rows) if row["error_code"]] == [5]
    assert rows[5]["error_code"] == "crashed"


def test_a_list_that_is_damaged_further_down_is_raised_when_the_rest_is_committed(
    task: Task, videos: VideoList, tmp_path: Path
) -> None:
    listed = tmp_path / "list.csv"
    lines = [f"{item.path},a" for item in videos.items]
    listed.write_text("\n".join(["path,label", *lines, f"{videos.items[0].path},b"]))

    with Several([task, task]) as engine, pytest.raises(DataError, match="labels of one video differ"):
        score_with(
            engine, InputStream(VideoStream(listed), Selection()), tmp_path / "out", videos_per_shard=2
        )

    assert not list(tmp_path.glob("out/*.tmp"))


def test_devices_that_would_give_other_rows_are_refused(task: Task) -> None:
    other = replace(task, options=ScoreOptions(top_k=1))
    with pytest.raises(DeviceError, match=r"the devices differ .*top_k"):
        Several([task, other])


def test_numbers_of_gpus_are_read() -> None:
    assert parse_devices("0,1,1") == (0, 1, 1)
    for wrong in ("", "0,", "cuda:0", "-1", "1000", "a" * 10_000):
        with pytest.raises(ConfigError, match="no list of GPUs") as caught:
            parse_devices(wrong)
        assert len(str(caught.value)) < 300


def test_a_process_sees_the_gpu_that_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert only_gpu(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert [only_gpu(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["4", "GPU-5", "4"]
