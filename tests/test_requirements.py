"""IVDR_REQUIRE: a test that misses what it names fails, instead of being skipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from requirements import IMPLIED, missing

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


@pytest.mark.parametrize(
    ("what", "required"),
    [
        *((what, asked) for what in ("gpu", "trt", "data") for asked in ("", what)),
        ("trt", "gpu"),
        ("gpu", "trt"),
    ],
)
def test_what_is_required_and_absent_is_a_failure(what: str, required: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + WITHOUT)
    name = {"gpu": "on_a_gpu", "trt": "of_tensorrt", "data": "of_real_clips"}[what]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "IVDR_TEST_DATA": str(tmp_path / "absent"),
        "IVDR_REQUIRE": required,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path)]
    command += ["-p", "no:cacheprovider", "-k", name, str(tmp_path / "test_it.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    if what in (required, *IMPLIED.get(required, ())):
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"(IVDR_REQUIRE asks for {what})" in done.stdout
    else:
        assert (done.returncode, "1 skipped" in done.stdout) == (0, True), done.stdout + done.stderr


def test_with_a_gpu_required_nothing_of_its_folder_may_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its tests miss by name, or are marked with, is required along."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "gpu").glob("*.py"))
    marks = set(re.findall(r"pytest\.mark\.(\w+)", text)) - {"parametrize"}
    needed = marks | set(re.findall(r'missing\(\s*"([^"]+)"', text))
    assert needed > {"gpu", "ort-gpu"}
    assert not re.search(r"\bskip(if)?\(|importorskip", text)
    monkeypatch.setenv("IVDR_REQUIRE", "gpu")
    endings = {}
    for what in (*needed, "data"):
        try:
            missing(what, "not there")
        except (
            pytest.fail.Exception,
            pytest.skip.Exception,
        ) as error:  # a skip that passes would skip this one
            endings[what] = type(error)
    assert endings == {**dict.fromkeys(needed, pytest.fail.Exception), "data": pytest.skip.Exception}
