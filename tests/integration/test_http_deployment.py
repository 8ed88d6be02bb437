"""The HTTP server with its workers, seen from the process that looks after them."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from bundles import reseal
from served import SETTINGS, has_ended, wait_for

from ivdr_deploy._console import exit_code
from ivdr_deploy.errors import ArtifactError, ServerError
from ivdr_deploy.serving.http import slot, worker_process
from ivdr_deploy.serving.http.auth import VARIABLE
from ivdr_deploy.serving.http.deployment import Deployment
from ivdr_deploy.serving.http.run_folder import Record, RunFolder, ask_server
from ivdr_deploy.serving.http.settings import HttpSettings

pytestmark = pytest.mark.slow


_FAULT = """
import os, sys
if "ivdr_deploy.serving.http.worker" in " ".join(sys.orig_argv):
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime
    right = OrtRuntime.infer
    def infer(runtime, video):
        return {name: value + os.path.exists(FLAG) for name, value in right(runtime, video).items()}
    OrtRuntime.infer = infer
"""


def test_a_worker_that_answers_wrong_or_not_at_all_is_replaced(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, videos: list[Path]
) -> None:
    flag = tmp_path / "wrong"
    (tmp_path / "sitecustomize.py").write_text(_FAULT.replace("FLAG", repr(str(flag))))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(worker_process, "ANSWER_SECONDS", 2.0)
    settings = HttpSettings(service=SETTINGS.service, canary_seconds=0.1)
    with Deployment(
        tiny_bundle, settings, host="127.0.0.1", port=0, run_dir=tmp_path / "run", auth=False
    ) as running:
        (wrong,) = running.current.ready
        flag.touch()
        wait_for(lambda: wrong not in running.current.ready)
        wait_for(lambda: has_ended(wrong.pid))
        wait_for(lambda: running.current.restarts >= 2)  # the one that followed was wrong from the beginning
        assert not running.current.ready
        flag.unlink()
        wait_for(lambda: running.current.ready)
        assert running.client.predict(videos[0])[0] == 200
        (stopped,) = running.current.ready
        os.kill(stopped.pid, signal.SIGSTOP)
        wait_for(lambda: running.current.ready not in ([], [stopped]))
        assert running.client.predict(videos[0])[0] == 200


def test_a_bundle_that_an_update_chose_and_that_is_gone_is_named_with_the_reason(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as folder:
        folder.write(Record(started_with=str(tiny_bundle.resolve()), serving=str(tmp_path / "gone")))
    settings = HttpSettings(service=SETTINGS.service)
    starting = Deployment(tiny_bundle, settings, host="127.0.0.1", port=0, run_dir=run, auth=False)
    with pytest.raises(ArtifactError, match="gone") as caught:
        starting.__enter__()
    assert f"remove {run / 'serving.json'} to serve {tiny_bundle.resolve()}" in caught.value.hint
    with RunFolder(run) as folder:  # it was left
        assert folder.read() is not None


def test_a_rollback_to_what_is_no_replacement_any_more_is_refused(
    tiny_bundle: Path, tiny_bundle_copy: Path, tmp_path: Path
) -> None:
    """After a restart it has to be loaded, and the folder may hold something else by then."""
    reseal(tiny_bundle_copy, name="other", version="0.9")
    run, serving = tmp_path / "run", str(tiny_bundle.resolve())
    with RunFolder(run) as folder:
        folder.write(Record(started_with=serving, serving=serving, previous=str(tiny_bundle_copy)))
    settings = HttpSettings(service=SETTINGS.service)
    with Deployment(tiny_bundle, settings, host="127.0.0.1", port=0, run_dir=run, auth=False) as running:
        with pytest.raises(ArtifactError, match="the new bundle is of other"):
            list(ask_server(run, {"do": "rollback"}))
        assert running.client.describe()["modelName"] == "tiny"
        assert running.current.ready
    with RunFolder(run) as folder:
        record = folder.read()
    assert record is not None
    assert record.serving == serving


def test_a_worker_that_cannot_be_kept_running_ends_the_server_with_the_reason(
    tiny_bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "MOST_FAILURES", 2)
    monkeypatch.setenv(VARIABLE, "a-token-of-the-environment")
    before = set(psutil.Process().children())
    settings = HttpSettings(service=SETTINGS.service)
    with Deployment(
        tiny_bundle_copy, settings, host="127.0.0.1", port=0, run_dir=tmp_path / "run", auth=True
    ) as running:
        family = psutil.Process(running.current.ready[0].pid)
        for process in (family, *family.children(recursive=True)):
            assert VARIABLE not in process.environ(), "what decodes videos needs no token"
        reseal(tiny_bundle_copy, version="9.0")  # in its place, as a second export would
        os.kill(running.current.ready[0].pid, signal.SIGKILL)
        with pytest.raises(
            ServerError,
            match=r"failed 2 times in a row, the last time: .* its version is '9\.0', and '1\.0' serves",
        ) as caught:
            running.wait()
        assert exit_code(caught.value) == 8
        with socket.create_connection(("127.0.0.1", urlsplit(running.client.inference_url).port or 0)):
            pass  # it was open all the time
    assert set(psutil.Process().children()) <= before
