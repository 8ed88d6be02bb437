"""Who is answered where the server asks for a token, and what those who have none get to know."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from served import ServingCommand, serving_command, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingCommand]:
    folder = tmp_path_factory.mktemp("guarded")
    with serving_command(tiny_bundle, folder / "run", "--auth", "token") as running:
        yield running


@pytest.fixture(scope="module")
def token(guarded: ServingCommand) -> str:
    return (guarded.run_dir / "token").read_text().strip()


def fetch(
    url: str, path: str, *authorization: str, method: str = "GET", body: bytes | None = None
) -> tuple[int, bytes, dict[str, str]]:
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        connection.putrequest(method, path)
        for value in authorization:
            connection.putheader("Authorization", value)
        connection.putheader("Content-Length", str(len(body or b"")))
        connection.endheaders(body)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, answer.read(), headers


def test_without_the_token_nothing_but_health_is_answered(
    guarded: ServingCommand, token: str, videos: list[Path]
) -> None:
    inference, management = guarded.client.inference_url, guarded.client.management_url
    video = videos[0].read_bytes()
    wrong = ([], [f"Bearer {token}x"], [f"Bearer {token[:-1]}"], ["Bearer "], [token], [f"Basic {token}"])
    for shown in (*wrong, [f"Bearer {token}", f"Bearer {token}"]):
        for url, path, method in (
            (inference, "/predictions/tiny", "POST"),
            (inference, "/predictions/tiny/1.0", "PUT"),
            (inference, "/openapi.json", "GET"),
            (inference, "/nowhere", "GET"),
            (management, "/models/tiny", "GET"),
            (management, "/metrics", "GET"),
        ):
            status, text, headers = fetch(
                url, path, *shown, method=method, body=video if method != "GET" else None
            )
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), (shown, path)
            answer = json.loads(text)
            assert set(answer) == {"code", "message", "hint"}
            assert answer["code"] == "unauthorized"
            assert token not in text.decode()
    for path in ("/ping", "/ready"):
        status, text, _ = fetch(inference, path)
        assert status == 200
        assert set(json.loads(text)) == {"status"}, "that is all there is to know without the token"


def test_with_the_token_everything_is_answered(
    guarded: ServingCommand, token: str, videos: list[Path]
) -> None:
    inference, management = guarded.client.inference_url, guarded.client.management_url
    fetch(inference, "/predictions/tiny", method="POST", body=b"x")
    for shown in (f"Bearer {token}", f"bearer {token}"):
        status, text, headers = fetch(
            inference, "/predictions/tiny", shown, method="POST", body=videos[0].read_bytes()
        )
        assert (status, headers["x-model-version"]) == (200, "1.0")
        assert json.loads(text)["predictions"]
    assert fetch(management, "/models/tiny", f"Bearer {token}")[0] == 200
    metrics = fetch(management, "/metrics", f"Bearer {token}")[1].decode()
    assert 'ivdr_requests_total{outcome="unauthorized"}' in metrics


def test_the_line_that_is_printed_is_answered(guarded: ServingCommand, videos: list[Path]) -> None:
    (line,) = [line for line in guarded.log.read_text().splitlines() if line.startswith("try: ")]
    words = line.removeprefix("try:").replace("video.mp4", str(videos[0]))
    answer = subprocess.run(f"{words} --silent", shell=True, capture_output=True, text=True)
    assert "predictions" in json.loads(answer.stdout), (words, answer)


def test_the_token_is_for_its_owner_alone(guarded: ServingCommand, token: str) -> None:
    assert len(token) >= 32
    assert not (guarded.run_dir / "token").stat().st_mode & 0o077
    family = [psutil.Process(guarded.process.pid)]
    family += family[0].children(recursive=True)
    assert len(family) >= 4
    assert not [process for process in family if token in " ".join(process.cmdline())]
    fetch(guarded.client.inference_url, "/predictions/tiny", f"Bearer {token}", method="POST", body=b"x")
    wait_for(lambda: '"status": 400' in guarded.log.read_text())
    assert token not in guarded.log.read_text()


def test_management_is_not_reached_from_elsewhere(guarded: ServingCommand) -> None:
    ports = {urlsplit(url).port for url in (guarded.client.management_url, guarded.client.metrics_url)}
    family = psutil.Process(guarded.process.pid)
    listening = [
        each.laddr
        for process in (family, *family.children(recursive=True))
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    assert {each.ip for each in listening if each.port in ports} == {"127.0.0.1"}
    assert {each.port for each in listening} == ports | {urlsplit(guarded.client.inference_url).port}
