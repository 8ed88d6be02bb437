"""The Open Inference Protocol (KServe v2) over gRPC, beside the HTTP server and over the same service."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import IvdrError, RequestError, RequestTimeoutError, ServerError
from ivdr_deploy.serving.core import schema
from ivdr_deploy.serving.core.oip import TensorAnswer
from ivdr_deploy.serving.http.auth import no_token, shows
from ivdr_deploy.serving.http.oip import TensorEndpoint
from ivdr_deploy.serving.http.oip_messages import read_message, write_message
from ivdr_deploy.serving.http.requests import log_access, usable_request_id
from ivdr_deploy.serving.http.settings import HttpSettings

OPEN_CALLS = frozenset({"ServerLive", "ServerReady", "Check"})
"""Answered without a token, as the paths of HTTP that say the same; the last is gRPC's own question after health."""

CODES: dict[int, grpc.StatusCode] = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By HTTP status; every other one is the request's own fault, INVALID_ARGUMENT."""

_BESIDE_VIDEOS = 8
"""Calls that are taken beside those with videos: whoever asks for health must get through."""


class GrpcListening:
    """Answers the protocol on a port, from ``start`` until ``stop``, in a thread of its own, as ``Listening`` HTTP.

    Args:
        endpoint: Answers.
        host: Address of the port.
        port: Of gRPC. Others of the same user may listen there too: the system deals connections out among them.
        settings: What is allowed.
        token: What whoever asks must show; None answers everyone.
    """

    def __init__(
        self, endpoint: TensorEndpoint, host: str, port: int, *, settings: HttpSettings, token: str | None
    ) -> None:
        self._host, self._port, self._settings = host, port, settings
        self._handlers = _handlers(_Calls(endpoint, token, seconds=settings.receive_seconds))
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._begun: Future[None] = Future()
        self._closed, self._ended = threading.Event(), threading.Event()
        self._failure = "no reason is known"

    def start(self) -> None:
        """Begin to accept connections.

        Raises:
            ServerError: if the port cannot be listened on.
        """
        threading.Thread(target=self._run, name="grpc-server", daemon=True).start()
        self._begun.result()

    def stop(self) -> None:
        """Refuse new calls, and let ``wait`` return when those that were taken are answered."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    def wait_closed(self) -> None:
        """Wait until it accepts no more connections."""
        self._closed.wait()

    @property
    def closed(self) -> bool:
        """Whether it accepts no more connections."""
        return self._closed.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; False after ``seconds``.

        Raises:
            ServerError: if it ended by itself.
        """
        ended = self._ended.wait(seconds)
        if ended and not self._stopping.is_set():
            raise ServerError(f"gRPC ended by itself ({self._failure})", hint="the log says more")
        return ended

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {str(error)[:200]}"
            if self._begun.done():
                raise
            self._begun.set_exception(error)
        finally:
            self._closed.set()
            self._ended.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", self._settings.service.max_request_bytes),
                ("grpc.max_send_message_length", -1),  # the answer has a limit of its own
            ),
            maximum_concurrent_rpcs=self._settings.max_requests + _BESIDE_VIDEOS,
        )
        server.add_generic_rpc_handlers(self._handlers)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            server.add_insecure_port(f"{host}:{self._port}")
        except RuntimeError as error:
            raise ServerError(f"port {self._port} (gRPC) of {self._host[:100]} cannot be used") from error
        await server.start()
        self._begun.set_result(None)
        await self._stopping.wait()
        leaving = asyncio.ensure_future(server.stop(self._settings.stop_seconds))
        await asyncio.sleep(0)  # it closes the port first, then waits
        self._closed.set()
        await leaving


class _Calls:
    """The calls of the protocol that make sense here; gRPC answers UNIMPLEMENTED to the others."""

    def __init__(self, endpoint: TensorEndpoint, token: str | None, *, seconds: float) -> None:
        self._endpoint, self._token, self._seconds = endpoint, token, seconds
        self._answering: set[asyncio.Future[TensorAnswer | schema.Response]] = set()

    async def message(self, messages: AsyncIterator[Any], context: Any) -> Any:
        """Wait for the message of a call: a client that begins calls and sends none would take all there may be."""
        error: IvdrError
        try:
            async with asyncio.timeout(self._seconds):
                return await anext(messages)
        except TimeoutError:
            error = RequestTimeoutError(
                f"the request did not come whole within {self._seconds:g} s",
                hint="send it again, or over a faster line",
            )
        except StopAsyncIteration:
            error = RequestError("the call holds no message")
        await _abort(self._endpoint.service.refuse(error), context)
        raise AssertionError("abort raises")

    async def check_token(self, name: str, context: Any) -> None:
        """Refuse a call that does not show the token, before its message is read."""
        if self._token is not None and name not in OPEN_CALLS:
            shown = [
                value.encode() if isinstance(value, str) else value
                for name, value in context.invocation_metadata() or ()
                if name == "authorization"
            ]
            if not shows(shown, self._token):
                await _abort(self._endpoint.service.refuse(no_token()), context)

    async def server_live(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._endpoint.ready())

    async def model_ready(self, request: Any, context: Any) -> Any:
        await self._check_model(request.name, request.version, context)
        return service_pb2.ModelReadyResponse(ready=self._endpoint.ready())

    async def check_health(self, request: Any, context: Any) -> Any:
        """Answer gRPC's own question after health, as Kubernetes asks it."""
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self._endpoint.ready() else states.NOT_SERVING)

    async def server_metadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(**self._endpoint.tensors.server_metadata())

    async def model_metadata(self, request: Any, context: Any) -> Any:
        await self._check_model(request.name, request.version, context)
        return service_pb2.ModelMetadataResponse(**self._endpoint.tensors.model_metadata())

    async def infer(self, request: Any, context: Any) -> Any:
        start = time.perf_counter()
        given = dict(context.invocation_metadata() or ())
        name = usable_request_id(given.get("x-request-id", "")) or uuid.uuid4().hex
        version = self._endpoint.service.model.version
        await context.send_initial_metadata((("x-request-id", name), ("x-model-version", version)))
        await self._check_model(request.model_name, request.model_version, context)
        # Shielded: who hangs up ends its call, not the work, which counts as taken until it is done.
        answering = asyncio.ensure_future(self._logged(request, name, start))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        found = await asyncio.shield(answering)
        if isinstance(found, schema.Response):
            await _abort(found, context)
            raise AssertionError("abort raises")
        model = self._endpoint.service.model
        return write_message(found, model.name, model.version)

    async def _logged(self, request: Any, name: str, start: float) -> TensorAnswer | schema.Response:
        found = await self._answer(request)
        status, code = (
            (found.status, found.body["code"]) if isinstance(found, schema.Response) else (200, "ok")
        )
        log_access(
            request_id=name,
            path="/inference.GRPCInferenceService/ModelInfer",
            status=status,
            code=code,
            ms=round((time.perf_counter() - start) * 1000, 3),
        )
        return found

    async def _answer(self, request: Any) -> TensorAnswer | schema.Response:
        try:
            with self._endpoint.admission.taking() as hold:
                asked = await asyncio.to_thread(read_message, request)
                return await self._endpoint.infer(asked, hold)
        except Exception as error:  # noqa: BLE001  # gRPC would tell the client the words of a defect of ours
            return self._endpoint.service.refuse(error)

    async def _check_model(self, name: str, version: str, context: Any) -> None:
        if not self._endpoint.knows(name, version):
            own = self._endpoint.service.model
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"there is no model {quoted(name)} of version {quoted(version)}, "
                f"only {quoted(own.name)} of version {quoted(own.version)}",
            )


async def _abort(found: schema.Response, context: Any) -> None:
    message, hint = found.body["message"], found.body["hint"]
    beside = [("ivdr-status", str(found.status)), ("ivdr-code", str(found.body["code"]))]
    if "item" in found.body:
        beside.append(("ivdr-item", str(found.body["item"])))
    if "Retry-After" in found.headers:
        beside.append(("retry-after", found.headers["Retry-After"]))
    await context.abort(
        CODES.get(found.status, grpc.StatusCode.INVALID_ARGUMENT),
        f"{message}. {hint}" if hint else message,
        tuple(beside),
    )


def _handlers(calls: _Calls) -> Sequence[grpc.GenericRpcHandler]:
    protocol: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
        "ServerLive": calls.server_live,
        "ServerReady": calls.server_ready,
        "ModelReady": calls.model_ready,
        "ServerMetadata": calls.server_metadata,
        "ModelMetadata": calls.model_metadata,
        "ModelInfer": calls.infer,
    }

    def handler(
        name: str, call: Callable[[Any, Any], Awaitable[Any]], request: Any, response: Any
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def checked(messages: AsyncIterator[Any], context: Any) -> Any:
            await calls.check_token(name, context)
            return await call(await calls.message(messages, context), context)

        # The protocol's calls have one message. As a stream it is read when this asks for it; the wire is the same.
        return grpc.stream_unary_rpc_method_handler(
            checked,
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )

    methods = {
        name: handler(
            name, call, getattr(service_pb2, f"{name}Request"), getattr(service_pb2, f"{name}Response")
        )
        for name, call in protocol.items()
    }
    check = handler(
        "Check", calls.check_health, health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    )
    return (
        grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),
        grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),
    )
