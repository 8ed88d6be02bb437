from __future__ import annotations

import ast
import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from videos import numbered_video

from examples.demo import __main__ as demo
from examples.demo.commands import IVDR, TRAIN, Pattern, StepError, run, serving
from examples.demo.journey import Journey
from ivdr_deploy.errors import FolderError

ROOT = Path(__file__).resolve().parents[2]


def in_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line that was shown, as it stands."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """The one command that was shown."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("$ "))
    return line.removeprefix("$ ")


def test_what_is_shown_does_in_a_shell_what_was_run(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    (folder / "wave").mkdir(parents=True)
    for name in ("b.mp4", "a.mp4"):
        numbered_video(folder / "wave" / name, num_frames=12, size=(64, 48))
    printed = run(IVDR, "predict", tiny_bundle, Pattern(folder, "*/*.mp4"), "--json")
    line = shown(capsys)
    assert "/*/*.mp4" in line
    assert [Path(json.loads(answer)["uri"]).name for answer in printed.splitlines()] == ["a.mp4", "b.mp4"]
    assert in_a_shell(line).stdout == printed


def test_a_command_that_fails_is_shown_and_fails_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StepError, match="python -m train pretrain ended with exit code 2"):
        run(TRAIN, "pretrain", "--config", tmp_path / "none.toml")
    assert in_a_shell(shown(capsys)).returncode == 2
    with pytest.raises(StepError, match="ivdr predict ended with exit code 5"):
        run(IVDR, "predict", tmp_path / "my model", "x.mp4")
    assert in_a_shell(shown(capsys)).returncode == 5
    with (
        pytest.raises(StepError, match="ivdr serve ended with exit code 5"),
        serving(tmp_path / "my model.mar", run_dir=tmp_path),
    ):
        pass
    assert in_a_shell(shown(capsys)).returncode == 5


def test_no_other_part_of_the_demo_shows_a_command() -> None:
    """What looks like one comes from ``commands._show`` alone, which its two callers run."""
    for path in sorted((ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("$ ") or path.name == "commands.py", f"{path}:{node.lineno}"


def test_the_demos_pattern_names_its_test_actors() -> None:
    names = [Path(f"wave/actor{number:02d}.mp4") for number in range(demo.TRAIN_ACTORS + demo.TEST_ACTORS)]
    assert [name for name in names if name.match(demo._TEST_PATTERN)] == names[demo.TRAIN_ACTORS :]


@pytest.mark.parametrize("kept", ["data/mine.txt", "pretrain/checkpoint.safetensors", "scores/a", ".env"])
@pytest.mark.parametrize("real", [False, True], ids=["made videos", "real clips"])
def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path, kept: str, real: bool) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    for name in (f"{label}/{number}.mp4" for label in "ab" for number in range(2)):
        (clips / name).parent.mkdir(parents=True, exist_ok=True)
        (clips / name).touch()
    (out / kept).parent.mkdir(parents=True)
    (out / kept).write_text("mine")

    with pytest.raises(FolderError, match="is not the run folder of a demo"):
        demo.run(clips if real else None, out)

    assert [path.relative_to(out) for path in out.rglob("*") if path.is_file()] == [Path(kept)]
    assert (out / kept).read_text() == "mine"


def test_the_folder_of_an_earlier_demo_is_taken_again(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "absent" / "run", tmp_path / "empty"):
        for _ in range(2):
            Journey(out=out).claim_folder()
            (out / "pretrain").mkdir(exist_ok=True)
        assert sorted(path.name for path in out.iterdir()) == [".ivdr-demo", "pretrain"]
