"""The journey of the README, typed as it stands there, on a few made videos; then its Python block."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from videos import numbered_video

from ivdr_deploy.cli import main as ivdr
from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.torchserve.config import Ports
from train.__main__ import main as train

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = [
    "model.backbone=tiny", "clip.num_frames=4", "clip.frame_stride=2", "clip.short_side=36", "clip.crop_size=32",
    "view_plan.num_clips=2", "device=cpu", "optim.epochs=1", "optim.batch_size=4",
]  # fmt: skip
"""The README names the paper's settings, which take a GPU and days."""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with every file that the README names."""
    # Not tmp_path: sockets lie in the run folder of the server, and their paths may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ivdr-") as name:
        monkeypatch.chdir(name)
        yield write_files(Path(name))
        monkeypatch.undo()


def write_files(folder: Path) -> Path:
    (folder / "videos").mkdir()
    names = []
    for index in range(8):
        names.append(f"videos/{index}.mp4")
        numbered_video(folder / names[-1], num_frames=12 + index, size=(64, 48))
    for name in ("video.mp4", "long.mp4", "a.mp4", "b.mp4"):
        (folder / name).symlink_to(names[0])
    rows = [f"{name},{('sit', 'wave')[index % 2]}" for index, name in enumerate(names)]
    (folder / "videos.csv").write_text("\n".join(["path", *names]) + "\n")
    (folder / "train.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    (folder / "test.csv").write_text("\n".join(["path,label", *rows[:4]]) + "\n")
    (folder / "train").mkdir()
    (folder / "train" / "configs").symlink_to(ROOT / "train" / "configs")
    return folder


def block(language: str, *, heading: str) -> str:
    """The first fenced block of a language under a heading."""
    found = re.search(rf"^## {heading}$.*?^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def first_of_five_ports() -> int:
    for first in range(20_000 + os.getpid() % 4000 * 10, 65_000, 5):
        with suppress(ServerError):
            Ports.starting_at(first).check()
            return first
    raise AssertionError("no five ports in a row are free")


def serve(words: list[str]) -> int:
    """Run ``ivdr serve`` until it is ready, then stop it as Ctrl-C does."""
    program = str(Path(sysconfig.get_path("scripts")) / "ivdr")
    ports = ["--port", str(first_of_five_ports())]
    with subprocess.Popen([program, *words, *ports], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "stop it with Ctrl-C" in line:
                process.send_signal(signal.SIGINT)
        assert "READY" in said, said
        return process.wait()


def ended(run: Callable[[], object]) -> object:
    try:
        return run()
    except SystemExit as error:
        return error.code


def run_lines(lines: list[str], capsys: pytest.CaptureFixture[str], *, small: list[str]) -> None:
    """Run commands of the README.

    Args:
        lines: The commands.
        capsys: What they print, for the message of one that fails.
        small: Settings for whatever trains.
    """
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[1] == "serve":
            code: object = serve(words[1:])
        elif words[0] == "ivdr":
            code = ended(lambda words=words[1:]: ivdr(words))
        else:
            added = small if words[3] in ("pretrain", "finetune") else []
            code = ended(lambda words=[*words[3:], *added]: train(words))
        assert not code, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.torchserve
def test_the_journey_runs_as_it_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = block("console", heading="The journey").splitlines()
    assert len(lines) >= 12
    run_lines(lines, capsys, small=SMALL)
    exec(compile(block("python", heading="From Python"), "README.md", "exec"), {})
    assert re.findall(r"pyarrow\.Table", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.torchserve
def test_own_classes_become_an_endpoint_as_it_is_written(
    folder: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the download: a bundle of ``tiny`` takes the place of the published model."""
    for index, label in enumerate(["sit", "wave"] * 3):
        (folder / "clips" / label).mkdir(parents=True, exist_ok=True)
        numbered_video(
            folder / "clips" / label / f"p{index // 2}_{label}.mp4", num_frames=14 + index, size=(64, 48)
        )
    shutil.copytree(tiny_bundle, folder / "runs" / "i3d")
    first, *lines = block("console", heading="Your own classes").splitlines()
    assert first == "$ ivdr import i3d-k400 -o runs/i3d"
    assert len(lines) == 5
    (folder / "demo_finetune.toml").write_text(
        (ROOT / "train/configs/demo_finetune.toml").read_text().replace("epochs = 48", "epochs = 3")
    )
    run_lines(lines, capsys, small=["against=demo_finetune.toml"])
    assert "taken: " in capsys.readouterr().err
