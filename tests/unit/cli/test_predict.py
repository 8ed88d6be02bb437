from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint
from lists import touch
from rights import make_too_deep
from videos import numbered_frame, numbered_video, write_video

from ivdr_deploy.cli import main
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring import read_scores


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


NAME = b"caf\xe9\n.avi"
LOCALES: dict[str, dict[str, str]] = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "iso-8859-1": {"PYTHONIOENCODING": "iso-8859-1"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


IN_TURN = """
import json, sys
from ivdr_deploy.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as ended:
        assert ended.code == 0, command
"""


def ivdr(locale: str, *commands: tuple[object, ...]) -> list[str]:
    """Run commands one after the other in one process, with the streams of a locale; return the lines on stdout."""
    kept = {key: value for key, value in os.environ.items() if key != "LANG" and not key.startswith("LC_")}
    text = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, "-c", IN_TURN, text]
    done = subprocess.run(command, env=kept | LOCALES[locale], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8").splitlines()


@pytest.mark.parametrize(
    "locale",
    [name if name == "ascii" else pytest.param(name, marks=pytest.mark.exhaustive) for name in LOCALES],
)
def test_names_that_are_not_utf8_go_out_in_every_locale(
    tiny_bundle: Path, tmp_path: Path, locale: str
) -> None:
    videos, scores = tmp_path / "videos", tmp_path / "scores:1"
    folder = os.fsencode(videos) + b"/d\xe9"
    os.makedirs(folder)
    numbered_video(tmp_path / "a.avi", num_frames=20, size=(64, 48), codec="mpeg4")
    os.rename(tmp_path / "a.avi", folder + b"/" + NAME)
    (tmp_path / "list.csv").write_bytes(b'path\n"videos/d\xe9/' + NAME + b'"\n')
    plain, predicted, scored, verified = ivdr(
        locale,
        ("predict", tiny_bundle, videos),
        ("predict", tiny_bundle, videos, "--json"),
        ("score", tiny_bundle, videos, "-o", scores, "--json"),
        ("verify", tiny_bundle, "--videos", tmp_path / "list.csv", "--no-record", "--json"),
    )
    assert plain.startswith(f"{videos}/d\\xe9/caf\\xe9\\u000a.avi: ")
    assert json.loads(predicted)["uri"] == f"{videos}/d\\xe9/caf\\xe9\n.avi"
    assert json.loads(scored)["ok"] == 1
    assert json.loads(verified)["videos"] == 1
    (row,) = read_scores(scores).to_pylist()
    assert (row["uri"], row["label"]) == ("d\\xe9/caf\\xe9\n.avi", "d\\xe9")


def test_what_a_folder_holds_besides_is_said(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(folder, "readme.txt", ".hidden.mp4")
    for command in (
        ("predict", tiny_bundle, folder),
        ("score", tiny_bundle, folder, "-o", folder / "out" / "scores", "--json"),
        ("verify", tiny_bundle, "--videos", folder, "--no-record", "--json"),
        ("bench", tiny_bundle, "--videos", folder, "--rounds", 1, "-o", folder / "out" / "bench.txt"),
    ):
        assert run(*command) == 0
        said = capsys.readouterr()
        assert "left out: 1 hidden: .hidden.mp4" in said.err
        assert "without the suffix of a video: " in said.err
        if "--json" in command:
            hidden = {"reason": "hidden", "count": 1, "examples": [".hidden.mp4"], "unread": False}
            assert hidden in json.loads(said.out)["left_out"]


def test_a_folder_that_could_not_be_read_is_exit_code_1(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_too_deep(folder)
    for command in (
        ("predict", tiny_bundle, folder),
        ("predict", tiny_bundle, folder, "--timeline"),
        ("score", tiny_bundle, folder, "-o", folder / "out" / "scores"),
        ("verify", tiny_bundle, "--videos", folder, "--no-record"),
        ("bench", tiny_bundle, "--videos", folder, "--rounds", 1, "-o", folder / "out" / "bench.txt"),
    ):
        assert run(*command) == 1, command
        said = capsys.readouterr().err
        assert "left out: 1 folders that cannot be read (File name too long): " in said
        assert ("; some folders could not be read" in said) == (command[0] == "verify")


def test_what_is_said_of_a_timeline_stays_on_its_line(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = (folder / "a.mp4").rename(folder / "a\n\x1b[32mPASS.mp4")
    assert run("predict", tiny_bundle, video, "--timeline") == 0
    said = capsys.readouterr()
    shown = f"{folder}/a\\u000a\\u001b[32mPASS.mp4: "
    assert f"\n{shown}4 windows, 0 events\n" in said.err
    assert all(line.startswith(shown) for line in said.out.splitlines())
    assert "\x1b" not in said.err + said.out


def test_a_container_is_allowed_by_the_option_that_its_error_names(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(
        tmp_path / "a.wmv", (numbered_frame(k, size=(64, 48)) for k in range(20)), codec="wmv2", bframes=0
    )
    assert run("predict", tiny_bundle, video) == 1
    assert "--allow-container asf" in capsys.readouterr().out
    assert run("predict", tiny_bundle, video, "--allow-container", "asf") == 0
    assert run("score", tiny_bundle, tmp_path, "-o", tmp_path / "s", "--allow-container", "asf") == 0
    assert run("verify", tiny_bundle, "--videos", tmp_path, "--allow-container", "asf", "--no-record") == 0
    assert (
        run("bench", tiny_bundle, "--videos", tmp_path, "--allow-container", "asf", "-o", tmp_path / "b") == 0
    )
    assert run("predict", tiny_bundle, video, "--allow-container", "wmv") == 2


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    tiny_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("score", tiny_bundle, "~", "--out=~/scores") == 0
    assert len(read_scores(tmp_path / "scores")) == 2
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    assert run("predict", "~/bundle", "~/a.mp4", "~/b.mp4") == 0
    assert not (tmp_path / "~").exists()


def test_a_name_too_long_is_a_line_with_its_reason(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", tiny_bundle, "x" * 300 + ".mp4", folder / "a.mp4", "--json") == 1
    bad, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bad["error"]["code"] == "unreadable"
    assert good["error"] is None
