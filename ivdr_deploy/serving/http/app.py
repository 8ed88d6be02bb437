"""The application: which paths there are, who is let in, and how an answer goes out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ivdr_deploy import __version__, errors
from ivdr_deploy._text import quoted
from ivdr_deploy.serving.core import schema
from ivdr_deploy.serving.core.answers import refusal
from ivdr_deploy.serving.core.canary import Canary
from ivdr_deploy.serving.core.metrics import REQUESTS
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.http.admission import Admission
from ivdr_deploy.serving.http.oip import HEALTH_METHODS, TensorEndpoint, add_routes, in_both_forms
from ivdr_deploy.serving.http.openapi import document
from ivdr_deploy.serving.http.requests import envelope, log_access, read_parts, request_id
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.streaming import answer_in_events, wants_events

logger = logging.getLogger(__name__)


_NOTHING_ELSE: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
"""Of what FastAPI would add. A redirect would lead to whatever host the request names, without a line in the log."""


def inference_app(
    service: InferenceService, settings: HttpSettings, canary: Canary | None, admission: Admission
) -> FastAPI:
    """Make the application that clients see: ``/predictions/NAME``, ``/v2``, ``/ping`` and ``/ready``."""
    model = service.model
    app = FastAPI(title=f"ivdr: {model.name}", version=__version__, **_NOTHING_ELSE)

    async def answer(request: Request) -> schema.Response:
        try:
            with admission.taking():
                parts = await read_parts(
                    request, most=settings.service.max_request_bytes, seconds=settings.receive_seconds
                )
                # In a thread: a video in base64 takes a while to decode, and others are waiting for this loop.
                future = await asyncio.to_thread(service.submit, parts, envelope(request))
                return await asyncio.wrap_future(future)
        except Exception as error:  # noqa: BLE001  # also a defect of ours: that is counted and logged as well
            return service.refuse(error)

    async def predict(request: Request) -> Response:
        exchange = _Exchange(request)
        if not wants_events(request):
            return exchange.finish(await answer(request))
        return await answer_in_events(
            request, service, settings, taking=admission.taking, finish=exchange.finish, log=exchange.log
        )

    for path in (f"/predictions/{model.name}", f"/predictions/{model.name}/{model.version}"):
        app.add_api_route(path, predict, methods=list(schema.METHODS))

    @app.api_route("/ping", methods=HEALTH_METHODS)
    async def ping() -> dict[str, str]:
        """Say that the process is alive; that says nothing about the model."""
        return {"status": "Healthy"}

    @app.api_route("/ready", methods=HEALTH_METHODS)
    async def ready() -> JSONResponse:
        """Say whether the network answers right: when it was loaded, and a golden clip a while ago."""
        health, reason = canary.said if canary is not None else ("ready", "")
        if health != "ready":  # why is for the log: anybody may ask here, also where others need a token
            logger.warning("the network is %s: %s", health, reason)
            body = {"code": f"network_{health}", "message": f"the network is {health}", "hint": "see the log"}
            return JSONResponse(body, 503, headers={"Retry-After": "5"})
        return JSONResponse({"status": "Ready"})

    described = document(model)
    app.openapi = lambda: described  # type: ignore[method-assign]
    add_routes(app, TensorEndpoint(service, admission, canary), settings)

    def count(code: str) -> None:
        service.metrics.add(REQUESTS, label=code)

    app.add_exception_handler(
        HTTPException, _refusing(f"videos are sent to /predictions/{model.name}", count)
    )
    app.add_exception_handler(Exception, _failed)
    return app


class Administered(Protocol):
    """What the management port tells about: a service in this process, or one in several."""

    @property
    def name(self) -> str:
        """Of the model."""

    def describe(self) -> dict[str, Any]:
        """Say what is loaded, in the form in which TorchServe does."""

    def metrics(self) -> str:
        """Say what was counted, in Prometheus' text format."""


def admin_app(of: Administered) -> FastAPI:
    """Make the application that only this machine sees: ``/models/NAME`` and ``/metrics``."""
    app = FastAPI(title="ivdr: management", version=__version__, **_NOTHING_ELSE)

    @app.get(f"/models/{of.name}")
    def describe() -> list[dict[str, Any]]:
        """Say what is loaded, in the form in which TorchServe does."""
        return [of.describe()]

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        """Say what was counted, for Prometheus."""
        return PlainTextResponse(of.metrics(), media_type="text/plain; version=0.0.4")

    app.add_exception_handler(
        HTTPException, _refusing(f"there are /models/{of.name} and /metrics", lambda code: None)
    )
    app.add_exception_handler(Exception, _failed)
    return app


class _Exchange:
    """One request and its answer: how long it takes, its name, its line in the log."""

    def __init__(self, request: Request) -> None:
        self._request_id = request_id(request.scope)
        self._path, self._start = request.scope["path"], time.perf_counter()

    def log(self, status: int, code: str) -> None:
        """Write its line."""
        ms = round((time.perf_counter() - self._start) * 1000, 3)
        log_access(request_id=self._request_id, path=self._path, status=status, code=code, ms=ms)

    def finish(self, found: schema.Response) -> Response:
        """Make the answer that is sent, and write the line."""
        self.log(found.status, found.body.get("code", "ok"))
        return Response(found.json, found.status, headers=found.headers, media_type="application/json")


class ByPort:
    """One application for each port.

    Args:
        apps: By the number of the port.
    """

    def __init__(self, apps: dict[int, ASGIApp]) -> None:
        self._apps = apps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        await self._apps[scope["server"][1]](scope, receive, send)


def _refusing(hint: str, count: Callable[[str], None]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Make what answers a request that no route takes, in the form of every other error; its code is counted."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: errors.MethodError.code}
        path = request.scope["path"]
        code = codes.get(error.status_code, "server")
        count(code)
        log_access(request_id=request_id(request.scope), path=path, status=error.status_code, code=code)
        body = {
            "code": code,
            "message": f"{quoted(request.method)} {quoted(path)}: {error.detail}",
            "hint": hint,
        }
        if path.startswith("/v2"):
            body = in_both_forms(body)
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))

    return refused


async def _failed(request: Request, error: Exception) -> Response:
    """Answer where there is a defect of ours, in the form of every other error; it is logged and raised again."""
    return JSONResponse(in_both_forms(refusal(error).body), 500)
