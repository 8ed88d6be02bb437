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

from ivdr_deploy._optional import require
from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError, IvdrError, ServerError, VideoOpenError
from ivdr_deploy.results import RemoteResult
from ivdr_deploy.serving.remote.answers import failure_of, result_of
from ivdr_deploy.serving.remote.retrying import Retry, Schedule, passes, retry_after

if TYPE_CHECKING:
    import httpx

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Send:
    """A step of an exchange: send the request, in at most so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class _Wait:
    """A step of an exchange: wait."""

    seconds: float


_Exchange = Generator[_Send | _Wait, "httpx.Response | httpx.TransportError | None", RemoteResult]
"""What a client does for one video, step by step; sync and async differ in how a step is taken."""


class _Requests:
    """What both clients know: where to send, how to say it, and what an answer means."""

    def __init__(self, url: str, model: str, *, token: str | None, retry: Retry | None) -> None:
        require("httpx", extra="client")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"the address of an endpoint is {quoted(url)}, expected http:// or https://",
                hint="for example http://127.0.0.1:8080",
            )
        self._base = url.rstrip("/")
        self.model = model
        self.retry = retry or Retry()
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def _predict_url(self) -> str:
        return f"{self._base}/predictions/{self.model}"

    def _request(self, video: str | Path | bytes, options: dict[str, Any]) -> dict[str, Any]:
        """Return what httpx is given for a video: the bytes alone, or a form where there are options."""
        if isinstance(video, bytes):
            content = video
        else:
            try:
                content = Path(video).read_bytes()
            except (OSError, ValueError) as error:  # ValueError: a null byte in the path
                raise VideoOpenError(
                    f"{quoted(str(video))} cannot be read: {error}", hint="check the path and its permissions"
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
            if isinstance(answer, httpx.Response):
                if answer.status_code == 200:
                    return result_of(answer.content, request_id=answer.headers.get("X-Request-Id", ""))
                failure: IvdrError = failure_of(answer.status_code, answer.content)
                if not passes(answer.status_code, failure.message):
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
        ConfigError: if the address is none.
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
        request = self._request(video, _options(top_k, num_clips, outputs, timings))
        exchange = self._exchange()
        step = next(exchange)
        while True:
            answer: httpx.Response | httpx.TransportError | None = None
            if isinstance(step, _Wait):
                time.sleep(step.seconds)
            else:
                answer = self._post(request, step.seconds)
            try:
                step = exchange.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    def _post(self, request: dict[str, Any], seconds: float) -> httpx.Response | httpx.TransportError:
        import httpx

        end, request = time.monotonic() + seconds, {**request, "timeout": _timeout(seconds)}
        try:
            with self._http.stream("POST", self._predict_url(), **request) as answer:
                pieces = []
                for piece in answer.iter_raw():
                    pieces.append(piece)
                    # A server that sends a byte now and then never runs into a timeout of one wait.
                    if time.monotonic() >= end:
                        raise httpx.ReadTimeout("the answer did not end in time", request=answer.request)
            return httpx.Response(answer.status_code, headers=answer.headers, content=b"".join(pieces))
        except httpx.TransportError as error:
            return error

    def ready(self) -> bool:
        """Say whether the endpoint's network answers right; False where nobody answers. TorchServe has no such path."""
        import httpx

        try:
            return self._http.get(f"{self._base}/ready", timeout=_CONNECT_SECONDS).status_code == 200
        except httpx.TransportError:
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

        options = _options(top_k, num_clips, outputs, timings)
        request = await anyio.to_thread.run_sync(self._request, video, options)  # it may read a file
        exchange = self._exchange()
        step = next(exchange)
        while True:
            answer: httpx.Response | httpx.TransportError | None = None
            if isinstance(step, _Wait):
                await anyio.sleep(step.seconds)
            else:
                answer = await self._post(request, step.seconds)
            try:
                step = exchange.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    async def _post(self, request: dict[str, Any], seconds: float) -> httpx.Response | httpx.TransportError:
        import anyio
        import httpx

        try:
            with anyio.fail_after(seconds):
                return await self._http.post(self._predict_url(), timeout=_timeout(seconds), **request)
        except TimeoutError:
            return httpx.ReadTimeout("the answer did not end in time")
        except httpx.TransportError as error:
            return error

    async def ready(self) -> bool:
        """See ``Client.ready``."""
        import httpx

        try:
            return (await self._http.get(f"{self._base}/ready", timeout=_CONNECT_SECONDS)).status_code == 200
        except httpx.TransportError:
            return False

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


def _options(
    top_k: int | None, num_clips: int | None, outputs: Sequence[str] | None, timings: bool | None
) -> dict[str, Any]:
    if isinstance(outputs, str):  # a sequence of letters otherwise
        raise ConfigError(
            f"outputs is {quoted(outputs)}, expected a list", hint=f"outputs=[{quoted(outputs)}]"
        )
    return {
        "top_k": top_k,
        "num_clips": num_clips,
        "outputs": None if outputs is None else list(outputs),
        "timings": timings,
    }


def _timeout(seconds: float) -> httpx.Timeout:
    """Let each wait for the network take what is left of the deadline, connecting less: it is quick or never."""
    import httpx

    return httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
