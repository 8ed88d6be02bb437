"""IVDR_REQUIRE: a test that misses what it names fails, instead of being skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TESTS = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    pass

@pytest.mark.trt
def test_of_tensorrt():
    pass

def test_of_real_clips(shared_data):
    pass
"""

WITHOUT = """
import sys
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None
"""
"""The machine has no TensorRT."""


@pytest.mark.parametrize("what", ["gpu", "trt", "data"])
@pytest.mark.parametrize("required", [False, True])
def test_what_is_required_and_absent_is_a_failure(what: str, required: bool, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + WITHOUT)
    name = {"gpu": "on_a_gpu", "trt": "of_tensorrt", "data": "of_real_clips"}[what]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "IVDR_TEST_DATA": str(tmp_path / "absent"),
        "IVDR_REQUIRE": what if required else "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path)]
    command += ["-p", "no:cacheprovider", "-k", name, str(tmp_path / "test_it.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    if required:
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"(IVDR_REQUIRE asks for {what})" in done.stdout
    else:
        assert (done.returncode, "1 skipped" in done.stdout) == (0, True), done.stdout + done.stderr
