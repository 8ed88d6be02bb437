from __future__ import annotations

from pathlib import Path

import pytest

from ivdr_deploy.errors import ArtifactError, ServerError
from ivdr_deploy.serving.client import EndpointClient
from ivdr_deploy.serving.torchserve.config import Ports
from ivdr_deploy.serving.torchserve.process import serve, worker_failure

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
