"""What the tests of scoring processes share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
