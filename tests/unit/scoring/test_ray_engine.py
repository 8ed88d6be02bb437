"""Ray, really started: on this machine, reachable from this machine only."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from videos import numbered_video

from examples.scoring import kills
from examples.scoring.kills import TIMINGS, finish
from examples.scoring.ray_kills import OPEN, actors_below, free_port, node
from ivdr_deploy.scoring import read_scores

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

VIDEOS = 20 * 32
"""Twenty shards: some are outstanding still when a busy machine has seen the first."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for index in range(VIDEOS):
        if index % 4 == 0:
            numbered_video(folder / f"{index:03d}.mp4", num_frames=8, size=(64, 48))
        else:
            (folder / f"{index:03d}.mp4").write_bytes(b"no video")
    return folder


def start(bundle: Path, videos: Path, out: Path, engine: str) -> subprocess.Popen[str]:
    return kills.start(bundle, videos, out, more=("--engine", engine))


def files(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name != "_run.lock")


def committed(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("part-*"))


@pytest.fixture(scope="module")
def local(tiny_bundle: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    finish(start(tiny_bundle, videos, out, "local"))
    return out


def test_the_same_files_come_out_and_nothing_is_open_to_others(tiny_bundle, videos, local, tmp_path):
    process = start(tiny_bundle, videos, tmp_path / "out", "ray")
    wait_for(lambda: (tmp_path / "out" / "_run.json").exists(), process)
    listening = {
        connection.laddr.ip
        for child in psutil.Process(process.pid).children(recursive=True)
        for connection in child.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    summary = finish(process)

    assert listening, "the processes of Ray were not looked at"
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert summary["scored"] == VIDEOS
    assert files(tmp_path / "out") == files(local)
    ours, theirs = (read_scores(out).drop_columns(TIMINGS) for out in (tmp_path / "out", local))
    assert ours.equals(theirs, check_metadata=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("who", ["actor", "driver"])
def test_a_kill_loses_nothing(tiny_bundle, videos, local, tmp_path, who):
    out = tmp_path / "out"
    process = start(tiny_bundle, videos, out, "ray")
    wait_for(lambda: committed(out), process)
    assert set(committed(out)) < set(committed(local)), "there was no work outstanding"
    if who == "actor":
        (actor,) = actors_below(process.pid)
        actor.kill()
        finish(process)
    else:
        assert kills.killed(process, lambda: True, pause=0)
        assert finish(start(tiny_bundle, videos, out, "local"))["scored"] < VIDEOS

    ours, theirs = (read_scores(folder).drop_columns(TIMINGS) for folder in (out, local))
    assert ours.equals(theirs)
    assert committed(out) == committed(local)


def test_a_run_that_is_asked_to_stop_does_not_go_on_to_its_end(tiny_bundle, videos, local, tmp_path):
    out = tmp_path / "out"
    process = start(tiny_bundle, videos, out, "ray")
    wait_for(lambda: committed(out), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)

    assert (process.returncode, output) == (130, ""), errors
    assert f"stopped: the rows that are in {out} stay" in errors
    kept = set(committed(out))
    assert set() < kept < set(committed(local)), "there was no work outstanding"
    assert finish(start(tiny_bundle, videos, out, "local"))["scored"] > 0
    ours, theirs = (read_scores(folder).drop_columns(TIMINGS) for folder in (out, local))
    assert ours.equals(theirs)


def test_what_an_actor_meets_is_raised_as_it_is(tiny_bundle, videos, local, tmp_path):
    out = tmp_path / "out"
    for shard in local.glob("part-*"):
        (out / shard.name).mkdir(parents=True)  # so that none can be written
    process = start(tiny_bundle, videos, out, "ray")
    output, errors = process.communicate(timeout=200)

    assert (process.returncode, output) == (9, ""), errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]  # Ray may say before it that the actor was ended
    assert last.startswith(f"ivdr: {out}/part-")
    assert last.endswith(".parquet: Is a directory")


def test_paths_of_the_command_are_those_of_its_own_working_directory(
    tiny_bundle, videos, local, tmp_path, monkeypatch
):
    """A cluster that runs already was started elsewhere."""
    address = f"127.0.0.2:{free_port()}"
    with node("127.0.0.2", "--head", f"--port={address.partition(':')[2]}", "--include-dashboard=false"):
        monkeypatch.chdir(videos.parent)
        bundle = Path(os.path.relpath(tiny_bundle))
        out = Path(os.path.relpath(tmp_path / "out"))
        more = ("--engine", "ray")
        process = kills.start(bundle, Path(videos.name), out, more=more, RAY_ADDRESS=address, **OPEN)
        finish(process)

    ours, theirs = (read_scores(folder).drop_columns(TIMINGS) for folder in (tmp_path / "out", local))
    assert ours.equals(theirs)
