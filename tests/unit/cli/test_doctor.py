from __future__ import annotations

import json
import sys

import pytest

from ivdr_deploy.cli import main


def test_doctor_passes_on_a_plain_install(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert answer["pass"] is True
    for part in (
        "decoder pyav",
        "decoder opencv",
        "runtime torch",
        "runtime onnxruntime",
        "TorchServe",
        "Java",
    ):
        assert answer["parts"][part]["state"] == "ok", part
    assert answer["environment"]["cores"] >= 1


def test_doctor_fails_and_says_how_to_fix_what_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # what a failed import looks like
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    part = json.loads(capsys.readouterr().out)["parts"]["decoder opencv"]
    assert ended.value.code == 1
    assert part["state"] == "broken"
    assert "pip install opencv-python-headless" in part["fix"]
