from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from examples.demo import __main__ as demo
from examples.demo.commands import IVDR, TRAIN, Pattern, StepError, run
from ivdr_deploy.errors import ArtifactError


def test_what_is_shown_is_what_a_shell_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(IVDR, "--version").startswith("ivdr ")
    assert capsys.readouterr().err.splitlines()[0] == "$ ivdr --version"


def test_a_pattern_is_shown_as_it_is_and_expanded(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    (folder / "wave").mkdir(parents=True)
    for name in ("b.mp4", "a.mp4"):
        (folder / "wave" / name).touch()
    pattern = Pattern(folder, "*/*.mp4")
    assert shlex.split(str(pattern)) == [f"{folder}/*/*.mp4"]
    with pytest.raises(ArtifactError):
        run(IVDR, "predict", tmp_path / "none", pattern)


def test_the_demos_pattern_names_its_test_actors() -> None:
    names = [Path(f"wave/actor{number:02d}.mp4") for number in range(demo.TRAIN_ACTORS + demo.TEST_ACTORS)]
    assert [name for name in names if name.match(demo._TEST_PATTERN)] == names[demo.TRAIN_ACTORS :]


def test_a_command_that_fails_fails_its_step(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="python -m train pretrain ended with exit code 2"):
        run(TRAIN, "pretrain", "--config", tmp_path / "none.toml")
