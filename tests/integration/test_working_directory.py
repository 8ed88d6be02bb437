"""Nothing that we start takes a module from the working directory, whatever lies there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from served import unused_ports_in_a_row
from videos import numbered_video

from ivdr_deploy.serving.client import EndpointClient

COPY = (
    "import os\nwith open({!r}, 'a') as ran:\n    ran.write('{} in ' + repr(os.sys.orig_argv[:4]) + '\\n')\n"
)


class Planted:
    """A working directory with a file for every module that anything could import; ``ran`` lists those that were."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ran = folder / "here", folder / "ran.txt"
        self.folder.mkdir()
        modules = {name for name in metadata.packages_distributions() if name.isidentifier()}
        for name in modules | set(sys.stdlib_module_names) - {"os", "sys"}:
            (self.folder / f"{name}.py").write_text(COPY.format(str(self._ran), name))

    @property
    def ran(self) -> str:
        return self._ran.read_text() if self._ran.exists() else ""


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    found = Planted(tmp_path)
    shown = [sys.executable, "-c", "import json, socket"]  # what the test would see
    subprocess.run(shown, cwd=found.folder, check=False, capture_output=True)
    assert "json in " in found.ran
    found._ran.unlink()
    return found


@pytest.fixture
def ivdr(tmp_path: Path) -> list[str]:
    """Start of a command. A script, as the installed program is: ``-P`` would be passed on to what it starts."""
    script = tmp_path / "bin" / "ivdr"
    script.parent.mkdir()
    script.write_text("from ivdr_deploy.cli import main\nmain()\n")
    return [sys.executable, str(script)]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return numbered_video(tmp_path / "a.mp4", num_frames=20, size=(64, 48))


@pytest.mark.parametrize("words", ["predict BUNDLE VIDEO", "archive BUNDLE --model-store OUT", "doctor"])
def test_commands_and_what_they_start(
    words: str, planted: Planted, ivdr: list[str], tiny_bundle: Path, video: Path, tmp_path: Path
) -> None:
    places = {"BUNDLE": str(tiny_bundle), "VIDEO": str(video), "OUT": str(tmp_path / "out")}
    command = [*ivdr, *(places.get(word, word) for word in words.split())]
    done = subprocess.run(command, cwd=planted.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert planted.ran == ""


@pytest.mark.slow
@pytest.mark.torchserve
def test_server_and_its_workers(
    planted: Planted, ivdr: list[str], tiny_bundle: Path, video: Path, tmp_path: Path
) -> None:
    ports = unused_ports_in_a_row()
    command = [*ivdr, "serve", str(tiny_bundle), "--json", "--port", str(ports.inference)]
    command += ["--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(
        command, cwd=planted.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        client = EndpointClient(
            model=said["name"],
            inference_url=said["url"].partition("/predictions/")[0],
            management_url=said["management_url"],
            metrics_url=said["metrics_url"],
        )
        assert client.predict(video)[0] == 200
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    assert planted.ran == ""
