from __future__ import annotations

from pathlib import Path

import pytest
from decode_jobs import forget_workers
from videos import numbered_video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("videos") / "a.mp4", num_frames=30)


@pytest.fixture(autouse=True)
def _own_workers() -> None:
    forget_workers()
