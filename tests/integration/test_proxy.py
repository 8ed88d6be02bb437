"""The proxies of deploy/, started with nginx: what goes through them, and what does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
import yaml
from requirements import missing
from served import wait_for
from websites import LOOPBACK, LoopbackSite, sends

pytestmark = pytest.mark.slow

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
TOKEN = "0123456789abcdef" * 4 + "-Aa_"  # longer than nginx lets a plain text of a map be


@pytest.fixture
def upstream() -> Iterator[LoopbackSite]:
    site = LoopbackSite()
    for path in ("/ping", "/metrics", "/predictions/clips", "/models/clips"):
        site.answers[path] = sends(path.encode())
    with site.running():
        yield site


@contextmanager
def proxied(conf: str, upstream: LoopbackSite, folder: Path) -> Iterator[int]:
    """Start nginx with a configuration of ours, its ports and folders changed alone; gives its port."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:
        missing("nginx", "nginx is not installed")
    assert nginx is not None
    with LoopbackSite().running() as other:
        port = other.port  # free when it has ended
    (folder / "tokens.map").write_text(f'"~^Bearer {TOKEN}$" 1;\n')
    changed = re.sub(r"listen \d+;", f"listen {LOOPBACK}:{port};", conf)
    changed = re.sub(r"http://127\.0\.0\.1:\d+;", f"http://{LOOPBACK}:{upstream.port};", changed)
    changed = changed.replace("/tmp/", f"{folder}/").replace("/etc/nginx/secrets", str(folder))
    (folder / "nginx.conf").write_text(changed)
    command = [nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "error.log")]
    ours = (
        "daemon off;" if os.geteuid() else "daemon off; user root;"
    )  # its workers write where this test does
    with subprocess.Popen([*command, "-g", ours], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: process.poll() is not None or answers(port))
            assert process.poll() is None, process.communicate()[1]
            yield port
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        ask(port, "/")
    except ConnectionRefusedError:
        return False
    return True


def ask(port: int, path: str, *, token: str | None = None, body: bytes | None = None) -> tuple[int, bytes]:
    connection = HTTPConnection(LOOPBACK, port, timeout=30)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_inference_goes_through_with_the_token_alone(upstream: LoopbackSite, tmp_path: Path) -> None:
    with proxied((DEPLOY / "torchserve" / "nginx.conf").read_text(), upstream, tmp_path) as port:
        assert ask(port, "/ping") == (200, b"/ping")
        assert ask(port, "/predictions/clips", token=TOKEN, body=b"video") == (200, b"/predictions/clips")
        for wrong in (None, "", TOKEN[:-1], TOKEN.upper(), TOKEN + "x", f"x {TOKEN}"):
            assert ask(port, "/predictions/clips", token=wrong, body=b"video")[0] == 401
        upstream.asked.clear()
        for path in ("/models/clips", "/metrics", "/", "/predictions/../models/clips", "/PING", "/pings"):
            assert ask(port, path, token=TOKEN)[0] == 404, path
        assert upstream.asked == []


def test_a_request_may_be_as_large_as_the_endpoint_takes(upstream: LoopbackSite, tmp_path: Path) -> None:
    conf = (DEPLOY / "torchserve" / "nginx.conf").read_text()
    (size,) = re.findall(r"client_max_body_size (\d+)m;", conf)
    largest = int(size) << 20
    with proxied(conf, upstream, tmp_path) as port:
        assert ask(port, "/predictions/clips", token=TOKEN, body=bytes(largest))[0] == 200
        upstream.asked.clear()
        status = declared(port, largest + 1)
        assert (status, upstream.asked) == (413, [])


def declared(port: int, length: int) -> int:
    """Announce a body of ``length`` bytes and send none of it."""
    connection = HTTPConnection(LOOPBACK, port, timeout=30)
    try:
        connection.putrequest("POST", "/predictions/clips")
        connection.putheader("Authorization", f"Bearer {TOKEN}")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_proxy_of_the_metrics_gives_nothing_else(upstream: LoopbackSite, tmp_path: Path) -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "ivdr.yaml").read_text())
    (conf,) = (item["data"]["nginx.conf"] for item in documents if item["kind"] == "ConfigMap")
    with proxied(conf, upstream, tmp_path) as port:
        assert ask(port, "/metrics") == (200, b"/metrics")
        upstream.asked.clear()
        for path in ("/ping", "/predictions/clips", "/metrics/x", "/metrics/../ping", "/"):
            assert ask(port, path)[0] == 404, path
        assert upstream.asked == []
