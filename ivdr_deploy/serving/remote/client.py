"""The typed client of the endpoint, sync and async, over httpx: videos in, results out, failures as exceptions.

::

    with Client("http://127.0.0.1:8080", "actions") as client:
        print(client.predict("video.mp4").top(3))

It knows both servers. Sending a video again changes nothing on a server, so that a connection that breaks is tried
again as well as an answer that says "not now"; see ``retrying``.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from ivdr_deploy._optional import require
from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import IvdrError, ServerError, VideoOpenError
from ivdr_deploy.results import RemoteResult
from ivdr_deploy.serving.remote.answers import failure_of, result_of
from ivdr_deploy.serving.remote.retrying import Retry, Schedule, passes, retry_after
from ivdr_deploy.serving.remote.sending import (
    CONNECT_SECONDS,
    Answer,
    Arriving,
    TimeLeft,
    authorization,
    check_url,
    chosen_options,
    in_pieces,
    wait_of,
)

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class _Send:
    """A step of an exchange: send the request, in at most so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class _Wait:
    """A step of an exchange: wait."""

    seconds: float


_Exchange = Generator[_Send | _Wait, "Answer | httpx.RequestError | None", RemoteResult]
"""What a client does for one video, step by step; sync and async differ in how a step is taken."""


class _Requests:
    """What both clients know: where to send, how to say it, and what an answer means."""

    def __init__(self, url: str, model: str, *, token: str | None, retry: Retry | None) -> None:
        require("httpx", extra="client")
        check_url(url)
        self._base = url.rstrip("/")
        self.model = model
        self.retry = retry or Retry()
        # Not packed: it could unpack to any size.
        self._headers = {"Accept-Encoding": "identity", **authorization(token)}

    def _predict_url(self) -> str:
        return f"{self._base}/predictions/{quote(self.model, safe='')}"

    def _request(self, video: str | Path | bytes, options: dict[str, Any]) -> dict[str, Any]:
        """Return what httpx is given for a video: the bytes alone, or a form where there are options."""
        if isinstance(video, bytes):
            content = video
        else:
            try:
                content = Path(video).read_bytes()
            except (OSError, ValueError) as error:  # ValueError: a null byte in the path
                raise VideoOpenError(
                    f"{quoted(str(video))} cannot be read: {reason_of(error)}",
                    hint="check the path and its permissions",
                ) from error
        given = {name: value for name, value in options.items() if value is not None}
        headers = {**self._headers, "X-Request-Id": secrets.token_hex(16)}
        if not given:
            headers["Content-Type"] = "application/octet-stream"
            return {"content": content, "headers": headers}
        files = {
            "options": (None, json.dumps(given), "application/json"),
            "video": ("video", content, "application/octet-stream"),
        }
        return {"files": files, "headers": headers}

    def _exchange(self) -> _Exchange:
        """Decide step by step what to do for one video; is sent the answer to each ``_Send``."""
        import httpx

        schedule = Schedule(self.retry)
        while True:
            answer = yield _Send(schedule.remaining())
            asked = 0.0
            if isinstance(answer, Answer):
                if answer.status == 200:
                    return result_of(answer.content, request_id=answer.headers.get("X-Request-Id", ""))
                failure: IvdrError = failure_of(answer.status, answer.content)
                if not passes(answer.status, failure.message):
                    raise failure
                asked = retry_after(answer.headers.get("Retry-After"))
            else:
                failure = ServerError(
                    f"no answer from {self._predict_url()} ({type(answer).__name__}: {str(answer)[:200]})",
                    hint="is the server running?",
                )
                if not isinstance(
                    answer, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout
                ):
                    raise failure  # the time is up, or the address is none
            wait = schedule.wait_seconds(asked=asked)
            if wait is None:
                raise failure
            yield _Wait(wait)


class Client(_Requests):
    """Sends videos to an endpoint. A context manager; safe to use from many threads.

    Args:
        url: Of its inference port, for example ``http://127.0.0.1:8080``.
        model: Name of the model.
        token: Where the endpoint asks for one.
        retry: How often and how long a request is tried.

    Raises:
        MissingDependencyError: if httpx is not installed.
        ConfigError: if the address is none, or the token cannot be one.
    """

    def __init__(self, url: str, model: str, *, token: str | None = None, retry: Retry | None = None) -> None:
        super().__init__(url, model, token=token, retry=retry)
        import httpx

        self._http = httpx.Client(trust_env=False)  # no proxy for what may be this machine

    def predict(
        self,
        video: str | Path | bytes,
        *,
        top_k: int | None = None,
        num_clips: int | None = None,
        outputs: Sequence[str] | None = None,
        timings: bool | None = None,
    ) -> RemoteResult:
        """Label one video.

        Args:
            video: Path of a local file, or the encoded bytes.
            top_k: Predictions wanted; None takes the endpoint's number.
            num_clips: Clips to look at; None takes the endpoint's number.
            outputs: Any of ``labels``, ``feature``, ``inter``, ``intra``; None is the labels.
            timings: Whether to answer how long each stage took.

        Raises:
            VideoError: if the video cannot be used.
            RequestError: if the request is wrong, for example an option (``OptionError``).
            InferenceError: if the network fails on it.
            QueueFullError: if the endpoint still had no room at the deadline; ``DrainingError``: if it is stopping.
            ServerError: if nobody answers, or what answers is no endpoint of this kind.
        """
        request = self._request(video, chosen_options(top_k, num_clips, outputs, timings))
        exchange = self._exchange()
        step = next(exchange)
        while True:
            answer: Answer | httpx.RequestError | None = None
            if isinstance(step, _Wait):
                time.sleep(step.seconds)
            else:
                answer = self._post(request, step.seconds)
            try:
                step = exchange.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    def _post(self, request: dict[str, Any], seconds: float) -> Answer | httpx.RequestError:
        import httpx

        end = time.monotonic() + seconds
        sent = self._http.build_request("POST", self._predict_url(), **request)
        sent = httpx.Request(
            sent.method,
            sent.url,
            headers=sent.headers,
            content=in_pieces(sent.stream, end),  # type: ignore[arg-type]  # of a client that is not async
            extensions={"timeout": TimeLeft(end)},
        )
        try:
            answer = self._http.send(sent, stream=True)
            try:
                arriving = Arriving(answer)
                for piece in answer.iter_raw():
                    arriving.take(piece)
                    # A server that sends a byte now and then never runs into a timeout of one wait.
                    if time.monotonic() >= end:
                        raise httpx.ReadTimeout("the answer did not end in time")
                return arriving.whole()
            finally:
                answer.close()
        except httpx.RequestError as error:
            return error

    def ready(self) -> bool:
        """Say whether the endpoint's network answers right; False where nobody answers. TorchServe has no such path."""
        import httpx

        try:
            with self._http.stream("GET", f"{self._base}/ready", timeout=CONNECT_SECONDS) as answer:
                return answer.status_code == 200
        except httpx.RequestError:
            return False

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AsyncClient(_Requests):
    """``Client`` for asyncio and trio: the same arguments, and the same exceptions. An async context manager."""

    def __init__(self, url: str, model: str, *, token: str | None = None, retry: Retry | None = None) -> None:
        super().__init__(url, model, token=token, retry=retry)
        import httpx

        self._http = httpx.AsyncClient(trust_env=False)

    async def predict(
        self,
        video: str | Path | bytes,
        *,
        top_k: int | None = None,
        num_clips: int | None = None,
        outputs: Sequence[str] | None = None,
        timings: bool | None = None,
    ) -> RemoteResult:
        """Label one video; see ``Client.predict``."""
        import anyio

        options = chosen_options(top_k, num_clips, outputs, timings)
        request = await anyio.to_thread.run_sync(self._request, video, options)  # it may read a file
        exchange = self._exchange()
        step = next(exchange)
        while True:
            answer: Answer | httpx.RequestError | None = None
            if isinstance(step, _Wait):
                await anyio.sleep(step.seconds)
            else:
                answer = await self._post(request, step.seconds)
            try:
                step = exchange.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    async def _post(self, request: dict[str, Any], seconds: float) -> Answer | httpx.RequestError:
        import anyio
        import httpx

        timeout = httpx.Timeout(wait_of(seconds), connect=min(seconds, CONNECT_SECONDS))
        try:
            with anyio.fail_after(seconds):
                async with self._http.stream(
                    "POST", self._predict_url(), timeout=timeout, **request
                ) as answer:
                    arriving = Arriving(answer)
                    async for piece in answer.aiter_raw():
                        arriving.take(piece)
                    return arriving.whole()
        except TimeoutError:
            return httpx.ReadTimeout("the answer did not end in time")
        except httpx.RequestError as error:
            return error

    async def ready(self) -> bool:
        """See ``Client.ready``."""
        import httpx

        try:
            async with self._http.stream("GET", f"{self._base}/ready", timeout=CONNECT_SECONDS) as answer:
                return answer.status_code == 200
        except httpx.RequestError:
            return False

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
