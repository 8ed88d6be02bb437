"""The calls of the Open Inference Protocol over gRPC: who may make them, their answers, and their lines in the log."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import RequestError, RequestTimeoutError
from ivdr_deploy.serving.core import schema
from ivdr_deploy.serving.core.metrics import REQUESTS
from ivdr_deploy.serving.core.oip import TensorAnswer
from ivdr_deploy.serving.http.auth import no_token, shows
from ivdr_deploy.serving.http.oip import TensorEndpoint
from ivdr_deploy.serving.http.oip_messages import read_message, write_message
from ivdr_deploy.serving.http.protobuf import parse
from ivdr_deploy.serving.http.requests import log_access, usable_request_id

PROTOCOL, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"

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


class _Call:
    """One call.

    Args:
        path: Service and method.
        context: Of gRPC.
    """

    def __init__(self, path: str, context: Any) -> None:
        self._path, self._context = path, context
        self._begin = time.perf_counter()
        self.given = tuple(context.invocation_metadata() or ())
        named = [str(value) for name, value in self.given if name == "x-request-id"]
        self._name = usable_request_id(named[0] if named else "") or uuid.uuid4().hex

    async def begin(self, version: str) -> None:
        """Say what every answer bears, whatever it is."""
        await self._context.send_initial_metadata(
            (("x-request-id", self._name), ("x-model-version", version))
        )

    def log(self, status: int, code: str) -> None:
        """Write its line."""
        ms = round((time.perf_counter() - self._begin) * 1000, 3)
        log_access(request_id=self._name, path=self._path, status=status, code=code, ms=ms)

    async def abort(self, found: schema.Response) -> None:
        """End it with an error; raises what gRPC ends calls with."""
        message, hint = found.body["message"], found.body["hint"]
        beside = [("ivdr-status", str(found.status)), ("ivdr-code", str(found.body["code"]))]
        if "item" in found.body:
            beside.append(("ivdr-item", str(found.body["item"])))
        if "Retry-After" in found.headers:
            beside.append(("retry-after", found.headers["Retry-After"]))
        await self._context.abort(
            CODES.get(found.status, grpc.StatusCode.INVALID_ARGUMENT),
            f"{message}. {hint}" if hint else message,
            tuple(beside),
        )

    async def refuse(self, found: schema.Response) -> None:
        """Write its line, and end it with an error before there was anything to answer."""
        self.log(found.status, found.body["code"])
        await self.abort(found)


_Answer = Callable[[Any, _Call], Awaitable[Any]]
"""Answers a call with its message."""


class _Calls:
    """The calls of the protocol that make sense here; gRPC answers UNIMPLEMENTED to the others."""

    def __init__(self, endpoint: TensorEndpoint, token: str | None, *, seconds: float) -> None:
        self._endpoint, self._token, self._seconds = endpoint, token, seconds
        self._answering: set[asyncio.Future[TensorAnswer | schema.Response]] = set()

    async def taken(self, name: str, call: _Call, messages: AsyncIterator[bytes]) -> bytes:
        """Let a call in, and wait for its message: whoever begins calls and sends none would take all there may be."""
        service = self._endpoint.service
        await call.begin(service.model.version)
        if self._token is not None and name not in OPEN_CALLS:  # before its message is read
            shown = [
                value.encode() if isinstance(value, str) else value
                for name, value in call.given
                if name == "authorization"
            ]
            if not shows(shown, self._token):
                await call.refuse(service.refuse(no_token()))
        try:
            async with asyncio.timeout(self._seconds):
                async for message in messages:
                    return message
        except TimeoutError:
            error = RequestTimeoutError(
                f"the request did not come whole within {self._seconds:g} s",
                hint="send it again, or over a faster line",
            )
            await call.refuse(service.refuse(error))
        await call.refuse(service.refuse(RequestError("the call holds no message")))
        raise AssertionError("abort raises")

    def asked(self, kind: Any, answer: _Answer) -> _Answer:
        """Give a question its message as an object of its class."""

        async def answered(message: bytes, call: _Call) -> Any:
            try:
                request = parse(kind, message)
            except RequestError as error:
                await call.refuse(self._endpoint.service.refuse(error))
                raise AssertionError("abort raises") from error
            return await answer(request, call)

        return answered

    async def server_live(self, request: Any, call: _Call) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, call: _Call) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._endpoint.ready())

    async def model_ready(self, request: Any, call: _Call) -> Any:
        await self._check_model(request.name, request.version, call)
        return service_pb2.ModelReadyResponse(ready=self._endpoint.ready())

    async def check_health(self, request: Any, call: _Call) -> Any:
        """Answer gRPC's own question after health, as Kubernetes asks it."""
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self._endpoint.ready() else states.NOT_SERVING)

    async def server_metadata(self, request: Any, call: _Call) -> Any:
        return service_pb2.ServerMetadataResponse(**self._endpoint.tensors.server_metadata())

    async def model_metadata(self, request: Any, call: _Call) -> Any:
        await self._check_model(request.name, request.version, call)
        return service_pb2.ModelMetadataResponse(**self._endpoint.tensors.model_metadata())

    async def infer(self, message: bytes, call: _Call) -> Any:
        # Shielded: who hangs up ends its call, not the work, which counts as taken until it is done.
        answering = asyncio.ensure_future(self._answer(message, call))
        del message  # only the work holds it, until it is read
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        found = await asyncio.shield(answering)
        if isinstance(found, schema.Response):
            await call.abort(found)
            raise AssertionError("abort raises")
        model = self._endpoint.service.model
        return write_message(found, model.name, model.version)

    async def _answer(self, message: bytes, call: _Call) -> TensorAnswer | schema.Response:
        """Answer a request and write its line. Its message is read, as over HTTP, when there is room for it."""
        found: TensorAnswer | schema.Response | None
        try:
            with self._endpoint.admission.taking() as hold:
                request = await asyncio.to_thread(parse, service_pb2.ModelInferRequest, message)
                del message
                found = self._unknown(request.model_name, request.model_version)
                if found is None:
                    asked = await asyncio.to_thread(read_message, request)
                    del request  # what is asked holds its tensors
                    found = await self._endpoint.infer(asked, hold)
        except Exception as error:  # noqa: BLE001  # gRPC would tell the client the words of a defect of ours
            found = self._endpoint.service.refuse(error)
        if isinstance(found, schema.Response):
            call.log(found.status, found.body["code"])
        else:
            call.log(200, "ok")
        return found

    async def _check_model(self, name: str, version: str, call: _Call) -> None:
        if (unknown := self._unknown(name, version)) is not None:
            await call.refuse(unknown)

    def _unknown(self, name: str, version: str) -> schema.Response | None:
        """Return what is answered to whoever names another model."""
        if self._endpoint.knows(name, version):
            return None
        own = self._endpoint.service.model
        message = f"there is no model {quoted(name)} of version {quoted(version)}"
        hint = f"there is {quoted(own.name)} of version {quoted(own.version)}"
        self._endpoint.service.metrics.add(REQUESTS, label="not_found")
        return schema.Response(status=404, body={"code": "not_found", "message": message, "hint": hint})


def handlers(
    endpoint: TensorEndpoint, token: str | None, *, seconds: float
) -> Sequence[grpc.GenericRpcHandler]:
    """Make what answers the calls.

    Args:
        endpoint: Answers.
        token: What whoever asks must show; None answers everyone.
        seconds: In which the message of a call must have come.
    """
    calls = _Calls(endpoint, token, seconds=seconds)
    questions: dict[str, _Answer] = {
        "ServerLive": calls.server_live,
        "ServerReady": calls.server_ready,
        "ModelReady": calls.model_ready,
        "ServerMetadata": calls.server_metadata,
        "ModelMetadata": calls.model_metadata,
    }
    protocol = {
        name: calls.asked(getattr(service_pb2, f"{name}Request"), answer)
        for name, answer in questions.items()
    }
    protocol["ModelInfer"] = calls.infer

    def handler(path: str, answer: _Answer, response: Any) -> grpc.RpcMethodHandler[Any, Any]:
        async def answered(messages: AsyncIterator[bytes], context: Any) -> Any:
            call = _Call(f"/{path}", context)
            return await answer(await calls.taken(path.rpartition("/")[2], call, messages), call)

        # The protocol's calls have one message. As a stream it is read when this asks for it; the wire is the same. It
        # comes as bytes: gRPC would make an object of it before anything is checked, and answer for one that is none.
        return grpc.stream_unary_rpc_method_handler(answered, response_serializer=response.SerializeToString)

    methods = {
        name: handler(f"{PROTOCOL}/{name}", answer, getattr(service_pb2, f"{name}Response"))
        for name, answer in protocol.items()
    }
    check = handler(
        f"{HEALTH}/Check",
        calls.asked(health_pb2.HealthCheckRequest, calls.check_health),
        health_pb2.HealthCheckResponse,
    )
    return (
        grpc.method_handlers_generic_handler(PROTOCOL, methods),
        grpc.method_handlers_generic_handler(HEALTH, {"Check": check}),
    )
