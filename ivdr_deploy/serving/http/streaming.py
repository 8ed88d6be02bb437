"""A timeline as server-sent events: each window and event as soon as it is known, then a summary or an error."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ivdr_deploy.serving.core import schema
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.timelines import Found
from ivdr_deploy.serving.http.requests import envelope, read_parts
from ivdr_deploy.serving.http.settings import HttpSettings

EVENT_STREAM = "text/event-stream"

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Nobody on the way keeps events back."""

_AHEAD = 64
"""Windows and events that may wait for a client to read them."""


def wants_events(request: Request) -> bool:
    """Say whether a client asks for its answer as a stream of events."""
    accepted = request.headers.get("accept", "").lower().split(",")
    return any(kind.partition(";")[0].strip() == EVENT_STREAM for kind in accepted)


async def answer_in_events(
    request: Request,
    service: InferenceService,
    settings: HttpSettings,
    *,
    taking: Callable[[], AbstractContextManager[object]],
    finish: Callable[[schema.Response], Response],
    log: Callable[[int, str], None],
) -> Response:
    """Answer a request for a timeline while it is worked on.

    What fails before anything was found is an ordinary answer with its status. A client that goes away, or does not
    read for ``receive_seconds``, ends the work.

    Args:
        request: Its body has not been read.
        service: Answers it.
        settings: Of the server.
        taking: Holds the request's place among those that are taken; raises where there is none.
        finish: Makes an ordinary answer.
        log: Called once with status and code when a stream has ended.
    """
    held = ExitStack()
    try:
        held.enter_context(taking())
        parts = await read_parts(
            request, most=settings.service.max_request_bytes, seconds=settings.receive_seconds
        )
        pump = _Pump(service.follow(parts, envelope(request)), patience=settings.receive_seconds)
        held.callback(pump.stop)
        first = await pump.next()
    except Exception as error:  # noqa: BLE001  # also a defect of ours: that is counted and logged as well
        held.close()
        return finish(service.refuse(error))
    except BaseException:  # the server leaves
        held.close()
        raise
    if isinstance(first, schema.Response):
        held.close()
        return finish(first)
    return _EventResponse(first, pump, held, log)


class _Pump:
    """Runs a generator in a thread of its own, a little ahead of a client that reads from the loop."""

    def __init__(self, items: Generator[Found | schema.Response, None, None], *, patience: float) -> None:
        self._items, self._patience = items, patience
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Found | schema.Response | None] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._stopped = False
        threading.Thread(target=self._run, name="timeline", daemon=True).start()

    async def next(self) -> Found | schema.Response | None:
        """Return the next item, None after the last."""
        item = await self._queue.get()
        self._room.release()
        return item

    def stop(self) -> None:
        """End the work as soon as the next item is there; calling it twice is allowed."""
        self._stopped = True
        self._room.release()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._room.acquire(timeout=self._patience) or self._stopped:
                    return
                self._give(item)
        finally:
            self._items.close()
            self._give(None)

    def _give(self, item: Found | schema.Response | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class _EventResponse(StreamingResponse):
    """Sends events, and lets go of what the request holds however that ends."""

    def __init__(
        self, first: Found | None, pump: _Pump, held: ExitStack, log: Callable[[int, str], None]
    ) -> None:
        super().__init__(self._events(first, pump), media_type=EVENT_STREAM, headers=_HEADERS)
        self._held, self._log = held, log
        self._code = "client_gone"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._held.close()
            self._log(200, self._code)

    async def _events(self, first: Found | schema.Response | None, pump: _Pump) -> AsyncIterator[bytes]:
        item = first
        while item is not None:
            kind, values = ("error", item.body) if isinstance(item, schema.Response) else item
            yield _event(kind, values)
            if kind in ("summary", "error"):
                self._code = values.get("code", "ok")
            item = await pump.next()


def _event(kind: str, values: dict[str, Any]) -> bytes:
    text = json.dumps(
        values, ensure_ascii=False, allow_nan=False
    )  # without line ends, which would end the event
    return f"event: {kind}\ndata: {text}\n\n".encode("utf-8", "backslashreplace")
