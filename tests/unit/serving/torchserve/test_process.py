from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from ivdr_deploy.errors import ArtifactError, FolderError, ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.torchserve import guard, logs
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.config import Ports, take_run_folder
from ivdr_deploy.serving.torchserve.logs import front_end_failure, last_words, read_log, worker_failure
from ivdr_deploy.serving.torchserve.process import serve
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

PREFIX = "2026-11-23T07:11:51,084 [INFO ] W-9000-echo_1.0-stdout MODEL_LOG - "


def log(*lines: str) -> str:
    return "\n".join(PREFIX + line for line in lines)


def test_cause_of_a_failed_worker_is_the_exception_of_the_first_attempt() -> None:
    text = log(
        "Torch worker started.",
        "Traceback (most recent call last):",
        '  File "x.py", line 8, in initialize',
        "    raise ValueError('ValueError: shown in the source')",
        "ValueError: the first",
        "Torch worker started.",
        "Traceback (most recent call last):",
        "OSError: the second",
    )
    assert worker_failure(text) == "ValueError: the first"


def test_our_own_error_is_preferred_to_what_it_was_raised_from() -> None:
    text = log(
        "KeyError: 'x'",
        "The above exception was the direct cause of the following exception:",
        "ivdr_deploy.errors.ArtifactError: manifest.json is damaged. Copy it again",
        "RuntimeError: 500 - Unknown exception",
    )
    assert worker_failure(text) == "ArtifactError: manifest.json is damaged. Copy it again"


def test_worker_that_died_without_a_word_shows_its_last_line() -> None:
    assert "loading" in worker_failure(log("starting", "loading"))
    assert worker_failure("") == "it logged nothing"


def test_endpoint_that_is_not_there_is_not_ready_and_says_where_it_was_looked_for() -> None:
    ports = Ports.unused()
    client = EndpointClient(
        model="tiny",
        inference_url=ports.url("inference"),
        management_url=ports.url("management"),
        metrics_url=ports.url("metrics"),
    )
    assert not client.ready()
    with pytest.raises(ServerError, match=str(ports.inference)):
        client.predict(b"video")


def test_serving_what_is_not_there_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent\.mar"):
        serve(tmp_path / "absent.mar", run_dir=tmp_path / "run")


FRONT_END = """2026-11-25T12:18:00,560 [WARN ] main org.pytorch.serve.ModelServer - Failed to load model: e.mar
org.pytorch.serve.archive.model.InvalidModelException: Failed to parse signature.json.
\tat org.pytorch.serve.archive.utils.ArchiveUtils.readFile(ArchiveUtils.java:45) ~[model-server.jar:?]
Caused by: com.google.gson.JsonSyntaxException: java.io.EOFException: End of input at line 1
\tat com.google.gson.Gson.fromJson(Gson.java:1236) ~[model-server.jar:?]
Caused by: java.io.EOFException: End of input at line 1 column 5
\t... 8 more
"""


def test_reason_of_the_front_end_is_its_exception_and_the_first_cause() -> None:
    said = front_end_failure(FRONT_END)
    assert said.startswith(
        "InvalidModelException: Failed to parse signature.json. <- EOFException: End of input"
    )
    full = "x - Failed to load model: e.mar\njava.io.IOException: No space left on device\n\tat java.base/x\n"
    assert front_end_failure(full) == "IOException: No space left on device"
    assert "disk" in front_end_failure("")


@pytest.mark.parametrize("name", ["tmp", "logs"])
def test_folders_that_no_server_made_are_not_deleted(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "run" / name / "precious.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(FolderError, match=f"holds '{name}'"):
        serve(tiny_bundle, run_dir=tmp_path / "run")
    archive = build_archive(tiny_bundle, model_store=tmp_path / "store", settings=EndpointSettings())
    with pytest.raises(FolderError, match="is not the run folder"):
        serve(archive.path, run_dir=tmp_path / "run").start()
    assert mine.read_text() == "mine"


COMMAND = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.%s); print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""

STARTER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-P", sys.argv[1], sys.executable, "-c", sys.argv[2]],
                           stdin=subprocess.PIPE, start_new_session=True)
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
def test_guard_ends_the_group_when_its_starter_is_killed(handler: str) -> None:
    command = [sys.executable, "-c", STARTER, guard.__file__, COMMAND % handler]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        said = {starter.stdout.readline().strip() for _ in range(2)}
        (group,) = (psutil.Process(int(line)) for line in said - {"up"})
        members = [group, *group.children(recursive=True)]
        assert len(members) == 3
        starter.kill()
        _, alive = psutil.wait_procs(members, timeout=guard._ORPHAN_SECONDS + 5.0)
    assert not alive


def test_what_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "END_SECONDS", 0.5)
    command = [sys.executable, "-c", COMMAND % "SIG_IGN"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (child,) = psutil.Process(process.pid).children()
        assert guard.end_group(process.pid) == 1
        child.wait(10)


def test_guard_ends_with_its_command() -> None:
    command = [sys.executable, "-P", guard.__file__, sys.executable, "-c", "import sys; sys.exit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(30) == 7


def test_two_servers_that_start_at_once_do_not_share_a_run_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    """Until Java has written its process id nothing else tells the second one of the first."""
    run, theirs = tmp_path / "run", tmp_path / "run" / "tmp" / "unpacked"
    archive = build_archive(tiny_bundle, model_store=tmp_path / "store", settings=EndpointSettings())
    held = take_run_folder(run)
    try:
        theirs.mkdir(parents=True)
        with pytest.raises(FolderError, match="another `ivdr serve` uses the run folder"):
            serve(archive.path, run_dir=run).start()
        with pytest.raises(FolderError, match="another `ivdr serve` uses the run folder"):
            serve(tiny_bundle, run_dir=run)
        assert theirs.is_dir(), "the second one deletes what the first one needs"
        assert not (run / "model_store").exists()
    finally:
        os.close(held)
    os.close(take_run_folder(run))


@contextmanager
def answering(body: bytes) -> Iterator[EndpointClient]:
    """A server of something else, that answers everything with 200."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        yield EndpointClient(model="tiny", inference_url=url, management_url=url, metrics_url=url)
        other.shutdown()


@pytest.mark.parametrize(
    "body", [b"<html>" + b"x" * 100_000, b"[]", b"{}", b"[1]", b'[{"workers": []}]', b"\xff"]
)
def test_another_server_in_its_place_is_no_endpoint(body: bytes) -> None:
    with answering(body) as client:
        assert not client.ready()
        with pytest.raises(ServerError, match="describes no model") as caught:
            client.describe()
        assert len(str(caught.value)) < 400
        with pytest.raises(ServerError, match="no metrics"):
            client.metrics()


def test_of_a_log_that_has_grown_a_line_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(worker_failure("ValueError: " + "x" * 100_000)) <= 500
    assert len(last_words("java.io.IOException: " + "\x1b" * 100_000)) <= 3000
    monkeypatch.setattr(logs, "_MOST_CHARACTERS", 10)
    (tmp_path / "x.log").write_text("0123456789abc")
    assert read_log(tmp_path / "x.log") == "0123456789"
    assert read_log(tmp_path / "absent.log") == ""
