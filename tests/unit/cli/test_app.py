from __future__ import annotations

import subprocess
import sys

import pytest

from ivdr_deploy import __version__, errors
from ivdr_deploy._console import exit_code
from ivdr_deploy.cli import main

COMMANDS = ("export", "verify", "predict", "archive", "serve", "score", "bench", "show", "doctor")


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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "Usage" in capsys.readouterr().out


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
