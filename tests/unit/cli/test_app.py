from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
from videos import numbered_video

from ivdr_deploy import __version__, errors
from ivdr_deploy._console import exit_code
from ivdr_deploy.cli import main

COMMANDS = (
    "export",
    "import",
    "verify",
    "predict",
    "archive",
    "serve",
    "score",
    "scores",
    "bench",
    "show",
    "doctor",
)


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ivdr_deploy.cli import main\n"
        "try:\n    main(['--help'])\nfinally:\n"
        "    print([m for m in ('torch', 'numpy', 'av', 'cv2', 'onnx', 'onnxruntime', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")
    positions = [result.stdout.index(f" {name} ") for name in COMMANDS]
    assert positions == sorted(positions)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(ivdr, command: str, flag: str) -> None:
    code, stdout, _ = ivdr(command, flag)
    assert (code, stdout.startswith(f"Usage: ivdr {command} ")) == (0, True)
    assert "{" not in stdout.splitlines()[0]  # {BUNDLE} looks like a choice
    assert f"Examples:\n    ivdr {command}" in stdout  # each on a line of its own


def test_the_shells_completion_is_offered(ivdr, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in ivdr("-h")[1]
    monkeypatch.setenv("_IVDR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "ivdr pre")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert ivdr()[1].split() == ["predict"]


@pytest.mark.parametrize("command", ["predict", "score", "verify", "bench"])
def test_every_command_that_reads_videos_has_the_same_words_for_it(
    ivdr, command: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = numbered_video(tmp_path / "a.mp4", num_frames=10, size=(64, 48))
    (tmp_path / "list.txt").write_text("a.mp4\n")
    words: dict[str, tuple[object, ...]] = {
        "predict": (video,),
        "score": (tmp_path / "list.txt", "-o", tmp_path / "scores"),
        "verify": ("--videos", tmp_path / "list.txt", "--no-record"),
        "bench": ("--videos", tmp_path / "list.txt", "--rounds", 1, "-o", tmp_path / "report.json"),
    }
    assert "VIDEOS" in ivdr(command, "-h")[1] or "--videos" in ivdr(command, "-h")[1]
    code, _, stderr = ivdr(command, tiny_bundle, *words[command], "--decoder", "opencv")
    assert code == 0, stderr
    monkeypatch.setitem(sys.modules, "cv2", None)  # so that it is seen to be asked for
    here = ("--isolation", "thread") if command == "score" else ()  # else in a process that has it
    code, _, stderr = ivdr(command, tiny_bundle, *words[command], "--decoder", "opencv", *here)
    assert (code, "ivdr-deploy[opencv]" in stderr) == (6, True), stderr


def test_a_busy_folder_and_another_run_are_not_wrong_usage(ivdr, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    numbered_video(tmp_path / "videos" / "a.mp4", num_frames=10, size=(64, 48))
    out = tmp_path / "scores"
    assert ivdr("score", tiny_bundle, tmp_path / "videos", "-o", out)[0] == 0
    assert ivdr("score", tiny_bundle, tmp_path / "videos", "-o", out, "--top-k", 1)[0] == 10
    with (out / "_run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ivdr("score", tiny_bundle, tmp_path / "videos", "-o", out)[0] == 10
    assert ivdr("score", tiny_bundle, tmp_path / "videos", "-o", out, "--tpo-k", 1)[0] == 2


def test_an_interruption_is_said_and_has_its_code(ivdr, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ivdr_deploy.cli._describe.describe", interrupted)
    assert ivdr("show", "x") == (130, "", "ivdr: interrupted\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"ivdr {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.VideoDecodeError, 4),
        (errors.CheckpointError, 5),
        (errors.GoldenMismatchError, 5),
        (errors.ClipShapeError, 5),
        (errors.MissingDependencyError, 6),
        (errors.DeviceError, 6),
        (errors.ParityError, 7),
        (errors.ServerError, 8),
        (errors.FolderError, 10),
        (errors.TrainingError, 11),
        (errors.InferenceError, 12),
    ],
)
def test_exit_codes_follow_the_table(error: type[errors.IvdrError], code: int) -> None:
    assert exit_code(error("x")) == code
