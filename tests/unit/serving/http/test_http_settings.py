from __future__ import annotations

from pathlib import Path

import pytest
import uvicorn

from ivdr_deploy.errors import ConfigError, ServerError
from ivdr_deploy.serving.core.settings import ServiceSettings, read_settings
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_requests = 0", "max_requests must be at least 1"),
        ("receive_seconds = 0", "receive_seconds must be positive"),
        ("canary_seconds = inf", "canary_seconds must be positive"),
        ("canary_seconds = 1e300", "canary_seconds must be positive and at most 1e+06"),
        ("startup_seconds = nan", "startup_seconds must be positive"),
        ("[service.limits]\nmax_decode_seconds = inf", "max_decode_seconds must be positive and at most"),
        ("[service.urls]\nseconds = 1e12", "urls.seconds must be positive and at most"),
        ("[service]\ntimeline_seconds = 1e12", "timeline_seconds must be positive and at most"),
        ("queue_size = 3", "queue_size"),
        ("[service]\ntop_k = 0", "top_k must be at least 1"),
        ("max_requests = ", "cannot be read as TOML"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "http.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(path, HttpSettings)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_not_named_keeps_the_endpoints_default(tmp_path: Path) -> None:
    path = tmp_path / "http.toml"
    path.write_text("max_requests = 3\n[service.limits]\nmax_bytes = 1000")
    settings = read_settings(path, HttpSettings)
    assert (settings.max_requests, settings.service.limits.max_bytes) == (3, 1000)
    assert settings.service.limits.max_frames == ServiceSettings().limits.max_frames
    assert settings.stop_seconds > settings.receive_seconds


def test_a_server_that_ends_by_itself_says_so(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(server: uvicorn.Server, sockets: object = None) -> None:
        raise OSError("no more descriptors")

    monkeypatch.setattr(uvicorn.Server, "run", fails)
    monkeypatch.setattr("threading.excepthook", lambda given: None)
    with HttpServer(tiny_bundle, HttpSettings(service=ServiceSettings(decode_workers=1)), port=0) as running:
        running.start()
        with pytest.raises(ServerError, match="OSError: no more descriptors"):
            running.wait(20)
