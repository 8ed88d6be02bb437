"""A service over a tiny bundle, and videos to send to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from videos import numbered_video

from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ServiceSettings


@pytest.fixture(scope="package")
def service(tiny_bundle: Path) -> Iterator[InferenceService]:
    with InferenceService.open(tiny_bundle, ServiceSettings(threads=1, decode_workers=2)) as opened:
        yield opened


@pytest.fixture(scope="package")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Three different videos."""
    folder = tmp_path_factory.mktemp("videos")
    lengths = (12, 25, 40)
    return [numbered_video(folder / f"{n}.mp4", num_frames=n, size=(64, 48)).read_bytes() for n in lengths]
