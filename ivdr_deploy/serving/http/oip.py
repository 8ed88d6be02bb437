"""The Open Inference Protocol (KServe v2) over HTTP, and what it shares with the one over gRPC."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ivdr_deploy.errors import IvdrError
from ivdr_deploy.serving.core import schema
from ivdr_deploy.serving.core.canary import Canary
from ivdr_deploy.serving.core.oip import TensorAnswer, TensorRequest, TensorService
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.http.admission import Admission
from ivdr_deploy.serving.http.oip_wire import HEADER_LENGTH, read_tensors, write_tensors
from ivdr_deploy.serving.http.requests import envelope, log_access, read_body, request_id
from ivdr_deploy.serving.http.settings import HttpSettings

HEALTH_METHODS = ["GET", "HEAD"]
"""Of questions after health: what balances load asks either way."""


class TensorEndpoint:
    """What every form of the protocol asks of a service.

    Args:
        service: Answers.
        admission: Counts what is being answered.
        canary: Says whether the network answers right; None where nothing asks it.
    """

    def __init__(self, service: InferenceService, admission: Admission, canary: Canary | None) -> None:
        self.service, self.admission = service, admission
        self.tensors = TensorService(service)
        self._canary = canary

    def ready(self) -> bool:
        """Whether the network answers right; the same as ``/ready``."""
        return self._canary is None or self._canary.said[0] == "ready"

    def knows(self, model: str, version: str) -> bool:
        """Whether this is the model that is served; an empty version is any."""
        own = self.service.model
        return model == own.name and version in ("", own.version)

    async def infer(
        self, request: TensorRequest, hold: Callable[[int], None]
    ) -> TensorAnswer | schema.Response:
        """Answer a request.

        Args:
            request: What is asked.
            hold: From ``Admission.taking``.
        """
        try:
            # In a thread, this and what follows: frames are put into a file, and each video is written to the memory
            # that its decoder reads.
            videos = await asyncio.to_thread(self.tensors.videos, request, hold)
        except IvdrError as error:
            return self.service.refuse(error)
        futures = await asyncio.to_thread(self.tensors.submit, videos, request)
        answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return self.tensors.combine(request, answers)


def add_routes(app: FastAPI, endpoint: TensorEndpoint, settings: HttpSettings) -> None:
    """Add the paths of the protocol below ``/v2``."""
    model = endpoint.service.model

    async def answer(request: Request) -> tuple[Response, str]:
        """Return the answer and its code for the log."""
        try:
            with endpoint.admission.taking() as hold:
                body = await read_body(
                    request, most=settings.service.max_request_bytes, seconds=settings.receive_seconds
                )
                asked = await asyncio.to_thread(
                    read_tensors, body, request.headers.get(HEADER_LENGTH), envelope(request)
                )
                found = await endpoint.infer(asked.request, hold)
            if isinstance(found, schema.Response):
                return refusal(found), found.body["code"]
            content, headers = await asyncio.to_thread(write_tensors, found, asked, model.name, model.version)
            return Response(content, 200, headers=headers), "ok"
        except Exception as error:  # noqa: BLE001  # also a defect of ours: that is counted and logged as well
            found = endpoint.service.refuse(error)
            return refusal(found), found.body["code"]

    async def infer(request: Request) -> Response:
        start = time.perf_counter()
        found, code = await answer(request)
        log_access(
            request_id=request_id(request.scope),
            path=request.scope["path"],
            status=found.status_code,
            code=code,
            ms=round((time.perf_counter() - start) * 1000, 3),
        )
        return found

    async def live() -> dict[str, bool]:
        return {"live": True}

    async def ready() -> Response:
        found = endpoint.ready()
        return JSONResponse({"ready": found}, 200 if found else 503)

    async def model_ready() -> Response:
        found = endpoint.ready()
        return JSONResponse({"name": model.name, "ready": found}, 200 if found else 503)

    async def server_metadata() -> dict[str, Any]:
        return endpoint.tensors.server_metadata()

    async def model_metadata() -> dict[str, Any]:
        return endpoint.tensors.model_metadata()

    app.add_api_route("/v2", server_metadata, methods=["GET"])
    app.add_api_route("/v2/health/live", live, methods=HEALTH_METHODS)
    app.add_api_route("/v2/health/ready", ready, methods=HEALTH_METHODS)
    for path in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
        app.add_api_route(path, model_metadata, methods=["GET"])
        app.add_api_route(f"{path}/ready", model_ready, methods=["GET"])
        app.add_api_route(f"{path}/infer", infer, methods=["POST"])


def refusal(found: schema.Response) -> Response:
    """Return an error as an answer of this protocol."""
    body = json.dumps(in_both_forms(found.body))
    return Response(body, found.status, headers=found.headers, media_type="application/json")


def in_both_forms(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of an error in the protocol's form, ``{"error": MESSAGE}``, and beside it in ours."""
    message, hint = body["message"], body["hint"]
    return {"error": f"{message}. {hint}" if hint else message, **body}
