"""What the tests of scoring processes share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint
from videos import numbered_video

from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring.task import Task
from ivdr_deploy.video.reader import VideoLimits


@pytest.fixture
def workers_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers unpickle the hostile sources."""
    tests = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests.parent), str(tests)]))


@pytest.fixture
def task(tiny_bundle: Path) -> Task:
    return Task(artifact=tiny_bundle, variant="onnx-fp32", limits=VideoLimits(max_decode_seconds=60.0))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture
def predictor(checkpoint: Path) -> Iterator[VideoPredictor]:
    model = open_model(checkpoint)
    with (
        model.runtime,
        VideoPredictor(model, decode=DecodeOptions(isolation="thread")) as predictor,
    ):
        yield predictor


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Five inputs: 0, 1 and 3 are videos, 2 is garbage, 4 is absent."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for index, num_frames in ((0, 12), (1, 20), (3, 1)):
        numbered_video(folder / f"{index}.mp4", num_frames=num_frames, size=(64, 48))
    (folder / "2.mp4").write_bytes(b"not a video at all" * 10)
    lines = [
        "path,label",
        *(f"{index}.mp4,{label}" for index, label in enumerate(["sit", "turn", "", "bow", ""])),
    ]
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


@pytest.fixture
def videos(listed: Path) -> VideoList:
    return read_video_list(listed)
