from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint
from videos import numbered_video

from ivdr_deploy.cli import main
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b", "a"):
        numbered_video(tmp_path / f"{name}.mp4", num_frames=20, size=(64, 48))
    return tmp_path


def test_json_is_one_object_per_video_and_equals_the_predictor(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", tiny_bundle, folder, "--json", "--top-k", 2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["uri"]).name for line in lines] == ["a.mp4", "b.mp4"]
    model = open_model(tiny_bundle)
    with model.runtime, VideoPredictor(model) as predictor:
        expected = predictor.predict(folder / "a.mp4").top(2)
    assert [
        (top["label"], pytest.approx(top["score"], abs=1e-6)) for top in lines[0]["predictions"]
    ] == expected
    assert lines[0]["error"] is None


def test_a_bad_video_is_a_line_with_its_reason_and_the_exit_code_says_so(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "c.mp4").write_text("no video")
    assert run("predict", tiny_bundle, folder / "c.mp4", folder / "a.mp4", "--json") == 1
    bad, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bad["error"]["code"] == "unreadable"
    assert bad["error"]["message"]
    assert bad["predictions"] == []
    assert good["error"] is None


def test_a_checkpoint_predicts_what_its_bundle_predicts(
    tiny_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny.safetensors")
    assert run("predict", tiny_bundle, folder / "a.mp4", "--top-k", 1) == 0
    assert run("predict", checkpoint, folder / "a.mp4", "--top-k", 1) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_a_model_that_is_not_there_is_one_line_and_exit_code_5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", tmp_path / "absent", tmp_path / "a.mp4") == 5
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ivdr: ")
    assert "absent" in line
