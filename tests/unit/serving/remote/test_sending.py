from __future__ import annotations

import time

import pytest

import ivdr_deploy as ivdr
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.serving.core.answers import MAX_ANSWER_BYTES
from ivdr_deploy.serving.remote import sending


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "http://[bad",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://a..b",
        "http://xn--:9",
        "http://127.0.0.1\n",
        "http://127.0.0.1/?top_k=1",
        "http://127.0.0.1/#x",
        "http://" + "x" * 100_000,
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_sent(url: str) -> None:
    for kind in (ivdr.Client, ivdr.AsyncClient):
        with pytest.raises(ConfigError, match="the address of an endpoint is") as caught:
            kind(url, "tiny")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "https://example.com/below/", "http://[::1]:80"])
def test_an_address_may_have_a_port_and_a_path(url: str) -> None:
    with ivdr.Client(url, "ti ny/..") as client:
        assert client._predict_url() == url.rstrip("/") + "/predictions/ti%20ny%2F.."


def test_neither_a_password_nor_a_token_is_shown() -> None:
    with pytest.raises(ConfigError, match="user name or password") as caught:
        ivdr.Client("http://me:secret@127.0.0.1:8080", "tiny")
    assert "secret" not in str(caught.value)
    for token in ("secret-secret\n", "s\u00e9cret-secret", "secret secret", ""):
        with pytest.raises(ConfigError, match="the token is empty, or holds") as caught:
            ivdr.Client("http://127.0.0.1:8080", "tiny", token=token)
        assert "ecret" not in str(caught.value).replace("ecret secret", "")


def test_every_wait_ends_at_the_deadline_whenever_it_begins() -> None:
    left = sending.TimeLeft(time.monotonic() + 1000.0)
    assert left.get("connect") == sending.CONNECT_SECONDS
    assert 990.0 < left.get("read") <= 1000.0
    assert sending.TimeLeft(time.monotonic() - 1.0).get("read") < 0.1
    assert sending.TimeLeft(float("inf")).get("write") <= 1e6, "systems do not take any number"


def test_an_answer_may_be_as_large_as_those_of_an_endpoint() -> None:
    assert sending._MOST_ANSWER_BYTES > MAX_ANSWER_BYTES
