"""How the real TorchServe starts, stops and is killed, and what is left of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from served import SETTINGS, processes_using, unused_ports_in_a_row, wait_for

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import write_manifest
from ivdr_deploy.errors import FolderError, ServerError
from ivdr_deploy.serving.torchserve.archive import build_archive, open_archive
from ivdr_deploy.serving.torchserve.config import Ports, ServerConfig
from ivdr_deploy.serving.torchserve.process import TorchServeProcess, serve

pytestmark = [pytest.mark.torchserve, pytest.mark.slow]


def test_run_folder_in_use_is_refused_with_the_line_that_stops_it(
    server: TorchServeProcess, archive: Path
) -> None:
    with pytest.raises(FolderError, match="already uses the run folder") as caught:
        serve(archive, run_dir=server.config.run_dir).start()
    assert "--stop" in caught.value.hint
    assert server.client.ready()


def test_taken_port_is_named_before_anything_starts(
    server: TorchServeProcess, archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match=f"port {server.config.ports.inference} \\(inference\\)"):
        serve(archive, run_dir=tmp_path, ports=server.config.ports).start()
    assert not processes_using(tmp_path)


def test_a_server_that_took_the_ports_in_the_last_moment_is_not_taken_for_this_one(
    server: TorchServeProcess, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ports, "check", lambda ports: None)  # they were free when it was looked
    with pytest.raises(ServerError, match=r"another server answers at|ended while it started"):
        serve(archive, run_dir=tmp_path, ports=server.config.ports).start()
    assert not processes_using(tmp_path)
    assert server.client.ready()


def test_worker_that_cannot_load_is_reported_by_its_own_error(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_manifest(folder, replace(open_bundle(folder).manifest, ivdr_version="9.0.0"))
    with pytest.raises(ServerError, match=r"ArtifactError: .* exported with ivdr_deploy 9\.0\.0") as caught:
        serve(folder, run_dir=tmp_path / "run").start()
    assert "pip" not in caught.value.hint
    assert str(tmp_path / "run" / "logs") in caught.value.hint
    assert not processes_using(tmp_path)


def test_archive_that_torchserve_itself_cannot_load_is_reported_at_once(
    archive: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copy(archive, tmp_path / "tiny.mar"))
    prepared = serve(damaged, run_dir=tmp_path / "run")
    damaged.write_bytes(archive.read_bytes()[:1000])  # between the check and the start
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"TorchServe cannot load .*tiny\.mar: \w+Exception") as caught:
        prepared.start()
    assert time.monotonic() - start < 30
    assert "disk" not in caught.value.message
    assert not processes_using(tmp_path)


def test_printed_line_starts_and_stops_the_same_server(
    archive: Path, tmp_path: Path, videos: list[Path]
) -> None:
    prepared = serve(archive, run_dir=tmp_path)
    config, client = prepared.config, prepared.client
    config.write()
    with (tmp_path / "shell.log").open("wb") as log:
        shell = subprocess.Popen(
            prepared.command_line, shell=True, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
        try:
            wait_for(client.ready)
            assert client.predict(videos[0])[0] == 200
            stop = config.shell_line(config.stop_command())
            subprocess.run(stop, shell=True, check=True, stdout=log, stderr=log)
            shell.wait(timeout=30)
            wait_for(lambda: not processes_using(tmp_path))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()


@contextmanager
def running_command(
    archive: Path, run_dir: Path, ports: Ports
) -> Iterator[tuple[subprocess.Popen[str], TorchServeProcess]]:
    """`ivdr serve` in a process of its own, ready; killed when the block ends, if it still runs."""
    server = TorchServeProcess(ServerConfig(archive=open_archive(archive), run_dir=run_dir, ports=ports))
    code = "from ivdr_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(archive), "--json"]
    command += ["--port", str(ports.inference), "--run-dir", str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["url"] == server.url
            yield process, server
        finally:
            process.kill()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.exhaustive)]
)
def test_command_answers_what_is_in_flight_and_leaves_nothing_running(
    tiny_bundle: Path, tmp_path: Path, videos: list[Path], number: signal.Signals
) -> None:
    # A lone request waits this long for others: time enough to stop the server while it is unanswered.
    settings = replace(SETTINGS, max_batch_delay_ms=2000)
    archive = build_archive(tiny_bundle, model_store=tmp_path, settings=settings).path
    run_dir = tmp_path / "run"
    answers: list[int] = []
    with running_command(archive, run_dir, unused_ports_in_a_row()) as (process, server):
        client = server.client
        # the guard, torchserve, Java, the worker; then the decode workers, what forks them and what cleans up
        commands = [" ".join(process.cmdline()) for process in processes_using(run_dir)]
        decoding = [command for command in commands if "multiprocessing" in command]
        assert (len(commands) - len(decoding), len(decoding)) == (4, settings.service.decode_workers + 2)
        request = threading.Thread(target=lambda: answers.append(client.predict(videos[0])[0]))
        request.start()
        wait_for(lambda: "ts_inference_requests_total" in " ".join(client.metrics()))
        assert not answers, "the request was answered before the server was stopped"
        process.send_signal(number)
        request.join()
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert "nothing of tiny is left running" in process.stderr.read()
    assert answers == [200]
    assert not processes_using(run_dir)
    assert not list((run_dir / "tmp").iterdir())  # there, and empty: the printed line needs it


def test_command_that_is_killed_leaves_nothing_on_the_ports(archive: Path, tmp_path: Path) -> None:
    ports = unused_ports_in_a_row()
    with running_command(archive, tmp_path / "run", ports) as (process, _):
        assert processes_using(tmp_path / "run")
        process.kill()
        wait_for(lambda: not processes_using(tmp_path / "run"))
    ports.check()


def test_steady_traffic_keeps_the_server_neither_running_nor_from_finishing(
    archive: Path, tmp_path: Path, videos: list[Path]
) -> None:
    server = serve(archive, run_dir=tmp_path / "run")
    sent: list[int] = []
    answers: list[tuple[float, int]] = []
    stopped = threading.Event()
    known = 0.0

    def send() -> None:
        while not stopped.is_set():
            sent.append(1)  # before it is begun
            begun, status = time.monotonic(), 0
            with suppress(ServerError):  # nobody listens any more, or it was cut off
                status = server.client.predict(videos[2], options={"num_clips": 32})[0]
            answers.append((begun, status))

    def accepted() -> float:
        """How many requests TorchServe has taken: the video of another may still be on its way."""
        metrics = server.client.metrics()
        return sum(value for name, value in metrics.items() if name.startswith("ts_inference_requests_total"))

    def all_are_accepted() -> bool:
        nonlocal known
        known = time.monotonic()
        return accepted() - before == len(sent)

    server.start()
    before = accepted()
    senders = [threading.Thread(target=send) for _ in range(6)]
    try:
        for sender in senders:
            sender.start()
        wait_for(lambda: len(answers) > 12)
        wait_for(all_are_accepted)
        stopping = time.monotonic()
        server.stop()
    finally:
        stopped.set()
        for sender in senders:
            sender.join()
        server.stop()
    took = max(begun for begun, _ in answers) - stopping
    assert took < 30, "the traffic kept it from stopping"
    early = [(begun, status) for begun, status in answers if begun < stopping]
    assert {status for begun, status in early if begun < known} == {200}
    assert {status for _, status in early} <= {200, 503}, "what was accepted before must be finished"
    late = [status for begun, status in answers if begun >= stopping]
    assert 503 in late, "admission was not closed"
    assert set(late) <= {200, 503, 0}
