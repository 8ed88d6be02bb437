"""Where the token comes from, and from whom it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivdr_deploy.cli import main
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.serving.http import deployment as deployment_module
from ivdr_deploy.serving.http.auth import VARIABLE, find_token, is_loopback, shows


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token, source = find_token(path)
    assert (len(token), source, path.stat().st_mode & 0o777) == (43, str(path), 0o600)
    assert find_token(path)[0] == token
    assert find_token(tmp_path / "other")[0] != token


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    find_token(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read it"):
        find_token(path)


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "x" * 16)
    assert find_token(tmp_path / "token") == ("x" * 16, f"the variable {VARIABLE}")
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize("token", ["", "short", "with a blank inside it", "ü" * 20, "x" * 513])
def test_a_token_that_protects_nothing_is_refused(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, token)
    with pytest.raises(ConfigError, match="16 to 512") as caught:
        find_token(tmp_path / "token")
    assert not token or token not in str(caught.value)


def test_an_address_is_loopback_or_not() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


@pytest.mark.parametrize(
    ("options", "auth"),
    [
        ([], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--auth", "none"], False),
        (["--auth", "token"], True),
    ],
    ids=["loopback", "all", "all-none", "loopback-token"],
)
def test_the_token_is_asked_for_unless_only_this_machine_can_ask(
    options: list[str], auth: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ChosenError(Exception):
        pass

    def deployment(*_: object, **given: object) -> None:
        assert given["auth"] is auth
        raise ChosenError

    monkeypatch.setattr(deployment_module, "Deployment", deployment)
    with pytest.raises(ChosenError):
        main(["serve", str(tmp_path), "--server", "http", *options])


def test_the_token_is_shown_in_one_header_with_its_scheme() -> None:
    token = "0123456789abcdef"
    own = token.encode()
    for right in (b"Bearer " + own, b"bearer  " + own, b"BEARER " + own + b" "):
        assert shows([right], token)
    bearer = b"Bearer " + own
    for wrong in (
        [],
        [bearer, bearer],
        [bearer, b"Basic x"],
        [b"Basic " + own],
        [own],
        [b"Bearer"],
        [bearer + b"x"],
    ):
        assert not shows(wrong, token), wrong
