"""One running endpoint for a whole module of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import SETTINGS, running_http
from videos import numbered_video

from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.process import TorchServeProcess, serve


@pytest.fixture(scope="module")
def archive(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(tiny_bundle, model_store=tmp_path_factory.mktemp("store"), settings=SETTINGS).path


@pytest.fixture(scope="module")
def server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeProcess]:
    with serve(archive, run_dir=tmp_path_factory.mktemp("ts")) as running:
        yield running


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [numbered_video(folder / f"{n}.mp4", num_frames=n, size=(64, 48)) for n in (12, 25, 40)]


@pytest.fixture(scope="module", params=[pytest.param("torchserve", marks=pytest.mark.torchserve), "http"])
def endpoint(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[EndpointClient]:
    """A client of each server."""
    if request.param == "torchserve":
        yield request.getfixturevalue("server").client
        return
    with running_http(tiny_bundle, HttpSettings(service=SETTINGS.service, canary_seconds=3600.0)) as running:
        yield running.client


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Iterator[VideoPredictor]:
    model = open_model(tiny_bundle, threads=1)
    with model.runtime, VideoPredictor(model) as opened:
        yield opened
