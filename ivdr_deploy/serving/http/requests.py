"""What arrives over HTTP, as the named parts and the envelope that the service takes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import OptionError, RequestError, RequestTimeoutError, VideoLimitError
from ivdr_deploy.serving.core.schema import Envelope

REQUEST_ID_HEADER = "x-request-id"
"""Of a request, and of every answer: see ``request_id``."""

access = logging.getLogger("ivdr_deploy.access")
"""One line of JSON for each request."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

_MOST_PARTS = 20
"""Of a form. One is the video, the others are options."""


def request_id(scope: Scope) -> str:
    """Return the caller's name for a request (``X-Request-Id``), or a new one where it has none that can be used."""
    state: dict[str, Any] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        state["request_id"] = usable_request_id(given) or uuid.uuid4().hex
    found: str = state["request_id"]
    return found


def usable_request_id(given: str) -> str:
    """Return a caller's name for a request if it can be used as it is, else nothing."""
    return given if _REQUEST_ID.fullmatch(given) else ""


def log_access(*, request_id: str, path: str, **facts: Any) -> None:
    """Write the line of one request, whatever protocol it came by; ``status`` is that of HTTP."""
    access.info(json.dumps({"time": time.time(), "request_id": request_id, "path": path[:200], **facts}))


_forms = ThreadPoolExecutor(2, thread_name_prefix="form")
"""Takes forms apart. What is in one decides how long that takes, and other requests wait neither for the loop of events
nor for the threads in which they are submitted."""


async def read_parts(request: Request, *, most: int, seconds: float) -> dict[str, Any]:
    """Read a request.

    Args:
        request: Its body has not been read.
        most: Bytes that the body may have.
        seconds: Time in which it must have come.

    Returns:
        Its parts by name; see ``parsing.parse_request``.

    Raises:
        VideoLimitError: if the body is larger.
        RequestTimeoutError: if it did not come in time.
        RequestError: if the client went away, or sent a form that is none.
        OptionError: if the query names an option twice.
    """
    body = await read_body(request, most=most, seconds=seconds)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parts: list[tuple[str, Any]] = [("body", body)]
    if content_type == "multipart/form-data":
        loop, headers = asyncio.get_running_loop(), request.headers
        parts = await loop.run_in_executor(_forms, lambda: asyncio.run(_read_form(headers, body)))
    elif content_type == "application/json" and body:
        parts = [("body", body.decode("utf-8", "replace"))]  # text is JSON, bytes may be a video
    found: dict[str, Any] = {}
    for name, value in (*parts, *request.query_params.multi_items()):
        if name in found:
            raise OptionError(f"{quoted(name)} is given twice", hint="give each part and option once")
        found[name] = value
    return found


async def read_body(request: Request, *, most: int, seconds: float) -> bytes:
    """Read a request's body.

    Raises:
        VideoLimitError: if it has more than ``most`` bytes.
        RequestTimeoutError: if it did not come within ``seconds``.
        RequestError: if the client went away.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _read_body(request, most)
    except TimeoutError as error:
        raise RequestTimeoutError(
            f"the request did not come whole within {seconds:g} s",
            hint="send it again, or over a faster line",
        ) from error
    except ClientDisconnect as error:
        raise RequestError("the client went away before the request was whole") from error


def envelope(request: Request) -> Envelope:
    """Return what HTTP says about a request besides its parts."""
    encodings = ", ".join(request.headers.getlist("content-encoding"))
    return Envelope(method=request.method, content_encoding=encodings)


async def _read_body(request: Request, most: int) -> bytes:
    """Read a body, at most so many bytes of it.

    What is too much is read to its end and thrown away: a client that is still sending would not see the answer.
    """
    parts, size = list[bytes](), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            parts.append(chunk)  # put together once: what grows is copied again and again
        else:
            parts.clear()
    if size > most:
        raise VideoLimitError(
            f"the request has {size} bytes, more than the limit of {most}",
            hint="send a smaller video, or raise max_bytes",
        )
    return b"".join(parts)


async def _read_form(headers: Headers, body: bytes) -> list[tuple[str, Any]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    # As the parser itself reads it: which of two counts, and what is quoted, is nobody else's to say.
    _, said = parse_options_header(headers["content-type"])
    charset = said.get(b"charset", b"utf-8").decode("latin-1")
    if charset.strip().lower() not in ("utf-8", "utf8", "us-ascii"):
        # Refused unread: some raise what nobody expects, and Python remembers every name that it is asked for.
        raise RequestError(
            f"the form says that it is in {quoted(charset)}, expected UTF-8", hint="leave charset out"
        )
    parser = MultiPartParser(headers, stream(), max_files=2, max_fields=_MOST_PARTS, max_part_size=len(body))
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(f"the form cannot be read ({error.message[:100]})") from error
    try:
        return [
            (name, await value.read() if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]
    finally:
        await form.close()
