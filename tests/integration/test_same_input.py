"""The promise of the contract: one file, one tensor, in training, prediction, scoring and serving."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_tiny_bundle
from contexts import make_context
from ivdr_handler import IvdrHandler

from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.runtimes import loading
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ClipSpec
from train.data import cache_videos
from train.evaluate import evaluate_model

CLIP = ClipSpec(num_frames=8, frame_stride=4, num_clips=3, short_side=72, crop_size=64)


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
        self.heard += [hashlib.sha256(np.ascontiguousarray(clip).tobytes()).hexdigest() for clip in video]
        return self._runtime.infer(video)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bundle(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = read_video_list(shared_data / "actions-mini" / "test.csv").labels
    return make_tiny_bundle(tmp_path_factory.mktemp("b") / "bundle", labels=labels, clip=CLIP)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["actions-mini/test.csv", "demo"])
def test_the_same_tensor_reaches_the_network_everywhere(
    name: str, bundle: Path, shared_data: Path, heard: list[str], tmp_path: Path
) -> None:
    videos = read_video_list(shared_data / name)
    paths = [item.path for item in videos.items]

    cached = cache_videos(videos, CLIP, tmp_path / "cache")
    training = [
        hashlib.sha256(clip.tobytes()).hexdigest()
        for row in range(len(cached))
        for clip in cached.eval_clips(row, CLIP)
    ]
    assert len(training) == len(paths) * CLIP.num_clips
    assert len(set(training)) > len(paths)  # different clips, so that equality below means something

    ivdr("predict", bundle, *paths, "--json")
    assert taken(heard) == training

    ivdr("score", bundle, shared_data / name, "-o", tmp_path / "scores")
    assert taken(heard) == training

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bundle").symlink_to(bundle)
    handler = IvdrHandler()
    handler.initialize(make_context(tmp_path / "model", []))
    for start in range(0, len(paths), 5):
        rows = [{"body": path.read_bytes()} for path in paths[start : start + 5]]
        context = make_context(tmp_path / "model", rows)
        handler.handle(rows, context)
        assert [context.get_response_status(i)[0] for i in range(len(rows))] == [200] * len(rows)
    assert taken(heard) == training

    if videos.labels:
        model = loading.open_model(bundle)
        with model.runtime:
            evaluate_model(model, videos)
        assert taken(heard) == training
