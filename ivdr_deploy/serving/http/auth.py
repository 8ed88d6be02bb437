"""Who is answered: whoever shows the token, or everyone."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ivdr_deploy.errors import ConfigError, UnauthorizedError
from ivdr_deploy.serving.core import schema
from ivdr_deploy.serving.http.oip import in_both_forms
from ivdr_deploy.serving.http.requests import log_access, request_id

VARIABLE = "IVDR_TOKEN"
"""Of the environment. It is kept from the processes that are started: they decode what anybody may have sent."""

OPEN_PATHS = frozenset({"/ping", "/ready", "/v2/health/live", "/v2/health/ready"})
"""Answered without a token: whether the process lives and the network answers right, and nothing else."""

_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")


def is_loopback(host: str) -> bool:
    """Say whether an address is reached from this machine alone; a name other than ``localhost`` counts as not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_token(path: Path) -> tuple[str, str]:
    """Return the token and where it is from: the environment, else a file, which is made when absent (mode 0600).

    Raises:
        ConfigError: if it is too short, or the file can be read by others.
    """
    if VARIABLE in os.environ:
        token, source = os.environ[VARIABLE], f"the variable {VARIABLE}"
    else:
        token, source = _read_or_make(path), str(path)
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"the token in {source} is not 16 to 512 visible ASCII characters",
            hint="make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return token, source


def _read_or_make(path: Path) -> str:
    if not path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        # Not ``_files.atomic_path``, which lets the umask decide who may read a file.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(f"{secrets.token_urlsafe(32)}\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    with path.open(encoding="ascii", errors="replace") as stream:
        if os.fstat(stream.fileno()).st_mode & 0o077:
            raise ConfigError(f"{path} holds the token and others may read it", hint=f"chmod 600 {path}")
        return stream.read(1024).strip()


class Guarded:
    """An application that is reached with the token alone, but for ``OPEN_PATHS``.

    Args:
        app: What is guarded.
        token: What ``Authorization: Bearer`` must say.
        refuse: Makes the answer to who has none.
    """

    def __init__(self, app: ASGIApp, token: str, refuse: Callable[[Exception], schema.Response]) -> None:
        self._app, self._token, self._refuse = app, token, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it without reading its body."""
        if scope["type"] != "http":
            return  # nothing here speaks anything else
        if scope["path"] in OPEN_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        found = self._refuse(no_token())
        log_access(
            request_id=request_id(scope), path=scope["path"], status=found.status, code=found.body["code"]
        )
        answer = Response(
            json.dumps(in_both_forms(found.body) if scope["path"].startswith("/v2") else found.body),
            found.status,
            headers=found.headers,
            media_type="application/json",
        )
        await answer(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        return shows([value for name, value in scope["headers"] if name == b"authorization"], self._token)


def shows(authorization: Sequence[bytes], token: str) -> bool:
    """Say whether the values of the header ``Authorization``, or of what another protocol has for it, are the token."""
    if len(authorization) != 1:
        return False
    kind, _, shown = authorization[0].partition(b" ")
    return hmac.compare_digest(kind.lower() + b" " + shown.strip(), f"bearer {token}".encode("ascii"))


def no_token() -> UnauthorizedError:
    """Return what whoever does not show the token is told."""
    return UnauthorizedError(
        "this endpoint answers whoever shows its token, and this request shows none or another",
        hint="send the header 'Authorization: Bearer TOKEN'",
    )
