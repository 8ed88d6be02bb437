"""Small files made to do harm cost little in the commands and at the endpoint, all their processes together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from costs import Cost, measured
from videos import numbered_video

from ivdr_deploy.scoring import read_scores
from ivdr_deploy.serving.torchserve.process import TorchServeProcess, serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the largest memory of a process is read from /proc"),
]

MORE_BYTES = 300 << 20
MORE_SECONDS = 2.0

FILES = {
    "mp4_index_20M.mp4": "too_large",
    "png16k_rgba64_lied.avi": "too_large",
    "mp4_dref_url.mp4": "unreadable",
    "m3u8.mp4": "unreadable",
}
STATUSES = {"too_large": 413, "unreadable": 400}

Ask = Callable[[Path], tuple[Cost, str | None]]
"""Gives a file to a command or to the endpoint; returns the cost, and the code of the error."""


@pytest.fixture(scope="module")
def ordinary_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("ordinary") / "a.mp4", num_frames=40)


def run(*words: object) -> tuple[Cost, subprocess.CompletedProcess[str]]:
    """Run ``ivdr`` with words; the cost is that of the whole command."""
    command = [sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
        measured(process.pid) as cost,
    ):
        stdout, stderr = process.communicate()
    return cost, subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def predict(tiny_bundle: Path) -> Ask:
    def ask(path: Path) -> tuple[Cost, str | None]:
        cost, done = run("predict", tiny_bundle, path, "--json", "--variant", "onnx-fp32")
        error = json.loads(done.stdout)["error"]
        assert done.returncode == (1 if error else 0), done.stderr
        return cost, error and error["code"]

    return ask


@pytest.fixture(scope="module")
def score(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    def ask(path: Path) -> tuple[Cost, str | None]:
        folder = tmp_path_factory.mktemp("score")
        (folder / "list.csv").write_text(f"path\n{path}\n")
        out = folder / "out"
        cost, done = run("score", tiny_bundle, folder / "list.csv", "-o", out, "--variant", "onnx-fp32")
        (row,) = read_scores(out).to_pylist()
        assert done.returncode == (0 if row["status"] == "ok" else 1), done.stderr
        return cost, row["error_code"]

    return ask


@pytest.fixture(scope="module")
def endpoint(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with serve(tiny_bundle, run_dir=tmp_path_factory.mktemp("ts")) as server:
        yield lambda path: _post(server, path)


def _post(server: TorchServeProcess, path: Path) -> tuple[Cost, str | None]:
    (worker,) = server.client.describe()["workers"]
    # Java is left out: how far it lets its heap grow is its own affair, and it never looks into a file.
    with measured(psutil.Process(int(worker["pid"])).pid) as cost:
        status, answer = server.client.predict(path)
    code = answer.get("code")
    assert status == (STATUSES[code] if code else 200)
    return cost, code


@pytest.mark.parametrize(
    "consumer", ["predict", "score", pytest.param("endpoint", marks=pytest.mark.torchserve)]
)
def test_hostile_files_cost_little_more_than_an_ordinary_clip(
    consumer: str, ordinary_clip: Path, shared_data: Path, request: pytest.FixtureRequest
) -> None:
    ask: Ask = request.getfixturevalue(consumer)
    ask(ordinary_clip)  # the first one also loads what the machine has not read yet
    ordinary, code = ask(ordinary_clip)
    assert code is None
    print(
        f"\n{consumer}, ordinary: {ordinary.memory_bytes >> 20} MiB, {ordinary.seconds:.2f} s, "
        f"processors {ordinary.cpu_seconds:.2f} s"
    )
    for name, expected in FILES.items():
        cost, code = ask(shared_data / "hostile" / name)
        more = cost.memory_bytes - ordinary.memory_bytes, cost.cpu_seconds - ordinary.cpu_seconds
        waited = cost.seconds - ordinary.seconds
        print(
            f"{consumer}, {name}: {more[0] >> 20:+} MiB, {waited:+.2f} s, processors {more[1]:+.2f} s, {code}"
        )
        assert code == expected, name
        assert more[0] < MORE_BYTES, name
        assert more[1] < MORE_SECONDS, name
