"""The promise of the contract: one file, one tensor, in training, prediction, scoring and serving."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_tiny_bundle
from contexts import make_context
from ivdr_handler import IvdrHandler
from videos import numbered_frame, numbered_video, write_video

import ivdr_deploy
from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.runtimes import loading
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.scorer import score_with
from ivdr_deploy.scoring.task import Task, open_predictor
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.settings import EndpointSettings
from ivdr_deploy.spec import ClipSpec, ViewPlan
from train.cache import Keeping, cache_videos
from train.evaluate import evaluate_model

CLIP = ClipSpec(num_frames=8, frame_stride=4, short_side=72, crop_size=64)
PLAN = ViewPlan(num_clips=3)
ACTIONS = (
    "bend", "handshake", "hug", "jack", "jump", "kick", "pjump", "point",
    "punch", "push", "run", "side", "skip", "walk", "wave1", "wave2",
)  # fmt: skip
"""The classes of the shared clips."""


class Listening:
    """A real runtime that also notes the digest of every clip that reaches the network."""

    def __init__(self, runtime: Any, heard: list[str]) -> None:
        self._runtime = runtime
        self.heard = heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.close()

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        self.heard += [digest(clip) for clip in video]
        return self._runtime.infer(video)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of many kinds: codecs, containers, rates, sizes, lengths, colours, and pictures stored on their side."""
    folder = tmp_path_factory.mktemp("made")
    numbered_video(folder / "h264_b.mp4", num_frames=70, size=(128, 96))
    numbered_video(folder / "h264_long_gop.mkv", num_frames=90, gop=60, bframes=0, size=(96, 128))
    numbered_video(folder / "mpeg4.avi", num_frames=50, codec="mpeg4", bframes=2, size=(176, 144))
    numbered_video(folder / "mpeg2.mpg", num_frames=40, codec="mpeg2video", size=(128, 96))
    numbered_video(folder / "vp9.webm", num_frames=40, codec="libvpx-vp9", bframes=0, size=(160, 90))
    still = (numbered_frame(number, size=(96, 96)) for number in range(30))
    write_video(folder / "mjpeg.mov", still, codec="mjpeg", bframes=0, pix_fmt="yuvj420p")
    deep = (numbered_frame(number, size=(128, 96)) for number in range(30))
    write_video(folder / "ten_bit_444.mkv", deep, pix_fmt="yuv444p10le")
    numbered_video(folder / "ntsc.mp4", num_frames=61, fps=30000 / 1001, size=(130, 98))
    numbered_video(folder / "one_frame.mp4", num_frames=1)
    numbered_video(folder / "five_frames.mp4", num_frames=5)
    gaps = [0, 40, 80, 400, 440, 480, 520, 1200, 1240, 1280, 1320, 1400]
    numbered_video(folder / "variable.mkv", num_frames=len(gaps), pts_ms=gaps, bframes=0)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("b") / "bundle"
    return make_tiny_bundle(folder, labels=ACTIONS, clip=CLIP, plan=PLAN)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of the clips that reach any network that is opened from here on."""
    digests: list[str] = []
    real = loading.open_model

    def opened(*arguments: Any, **options: Any) -> LoadedModel:
        model = real(*arguments, **options)
        return replace(model, runtime=Listening(model.runtime, digests))

    monkeypatch.setattr(loading, "open_model", opened)
    monkeypatch.setattr("ivdr_deploy.serving.core.service.open_model", opened)
    monkeypatch.setattr("ivdr_deploy.api.open_model", opened)
    monkeypatch.setattr("ivdr_deploy.scoring.task.open_model", opened)
    return digests


def ivdr(*arguments: object) -> None:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        assert ended.code == 0  # noqa: PT017  the exit code is what is tested


def taken(heard: list[str]) -> list[str]:
    digests = list(heard)
    heard.clear()
    return digests


def digest(clip: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(clip).tobytes()).hexdigest()


def assert_the_same_everywhere(source: Path, bundle: Path, heard: list[str], tmp_path: Path) -> int:
    """Put every video of a list on every way to the network; returns how many different clips there were."""
    videos = read_video_list(source)
    paths = [item.path for item in videos.items]

    cached = cache_videos(videos, CLIP, tmp_path / "cache", keeping=Keeping(form="raw"))
    training = [digest(clip) for row in range(len(cached)) for clip in cached.eval_clips(row, CLIP, PLAN)]
    assert len(training) == len(paths) * PLAN.num_clips

    ivdr("predict", bundle, *paths, "--json")
    assert taken(heard) == training

    with open_predictor(Task(artifact=bundle)) as stage:  # what `ivdr score` runs in a process of its own
        score_with(stage, InputStream(videos, Selection()), tmp_path / "scores")
    assert taken(heard) == training

    with ivdr_deploy.load(bundle) as model:
        for outcome in model.predict_many(path.read_bytes() for path in paths):
            assert outcome.error is None
    assert taken(heard) == training

    packed = build_archive(bundle, model_store=tmp_path / "store", settings=EndpointSettings())
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(tmp_path / "model")  # as TorchServe does
    handler = IvdrHandler()
    rows = [{"body": path.read_bytes()} for path in paths]
    handler.initialize(make_context(tmp_path / "model", []))
    for row in rows:
        context = make_context(tmp_path / "model", [row])
        handler.handle([row], context)
        assert context.get_response_status(0)[0] == 200
    handler._adapter.close()
    assert taken(heard) == training

    if videos.labels:
        model = loading.open_model(bundle)
        with model.runtime:
            evaluate_model(model, videos)
        assert taken(heard) == training
    return len(set(training))


def test_the_same_tensor_reaches_the_network_everywhere(
    made: Path, bundle: Path, heard: list[str], tmp_path: Path
) -> None:
    different = assert_the_same_everywhere(made, bundle, heard, tmp_path)
    assert different > 20  # so that equality means something


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("actions-mini/test.csv", marks=pytest.mark.exhaustive), "demo"]
)
def test_the_same_tensor_of_real_clips_reaches_the_network_everywhere(
    name: str, bundle: Path, shared_data: Path, heard: list[str], tmp_path: Path
) -> None:
    different = assert_the_same_everywhere(shared_data / name, bundle, heard, tmp_path)
    assert different > 60
