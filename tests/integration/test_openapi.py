"""The OpenAPI document of the HTTP server is true: its paths exist, and real answers are what it says."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from served import SETTINGS, running_http
from starlette.routing import Route

from ivdr_deploy.records import json_schema
from ivdr_deploy.serving.core.schema import Options
from ivdr_deploy.serving.http.app import inference_app
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tiny_bundle: Path) -> Iterator[HttpServer]:
    settings = HttpSettings(service=SETTINGS.service, max_requests=2, canary_seconds=3600.0)
    with running_http(tiny_bundle, settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def document(running: HttpServer) -> dict[str, Any]:
    return dict(httpx.get(f"{running.client.inference_url}/openapi.json").json())


class Caller:
    """Sends requests and holds the answers against the document."""

    def __init__(self, running: HttpServer, document: dict[str, Any]) -> None:
        self._url, self._document = running.client.inference_url, document
        self.seen: set[tuple[str, str, int]] = set()

    def __call__(self, method: str, path: str, status: int, **sent: Any) -> Any:
        answer = httpx.request(method, f"{self._url}{path}", timeout=60, **sent)
        assert answer.status_code == status, answer.text
        said = self._document["paths"][path][method.lower()]["responses"][str(status)]
        kind = answer.headers["content-type"].partition(";")[0]
        schema = said["content"][kind].get("schema", {})
        for name in said.get("headers", {}):
            assert name in answer.headers or kind == "application/json", name
        self.seen.add((method.lower(), path, status))
        body = answer.json()
        Draft202012Validator({**schema, "components": self._document["components"]}).validate(body)
        return body


@pytest.fixture(scope="module")
def call(running: HttpServer, document: dict[str, Any]) -> Caller:
    return Caller(running, document)


def test_it_is_valid_and_names_every_path_and_method(running: HttpServer, document: dict[str, Any]) -> None:
    validate(document)
    app = inference_app(running.service, running.settings, None, running.admission)
    served = {
        (route.path, method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.path != "/openapi.json"
        for method in route.methods or ()
    }
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert {pair for pair in served if pair[1] != "head"} == described


def test_answers_are_as_described(call: Caller, videos: list[Path]) -> None:
    video = videos[0].read_bytes()
    for path in ("/predictions/tiny", "/predictions/tiny/1.0"):
        call("POST", path, 200, content=video)
        call("PUT", path, 200, content=video)
    every = "timings=true&outputs=labels,feature,inter,intra"
    url = "/predictions/tiny"
    answer = call("POST", url, 200, content=video, params=every)
    properties = call._document["components"]["schemas"]["Answer"]["properties"]
    assert set(answer) == set(properties), "an answer can hold all that is described"
    body = {"video": base64.b64encode(video).decode(), "options": {"top_k": 1}}
    call("POST", url, 200, json=body)
    call("POST", url, 200, files={"video": video}, data={"options": '{"top_k": 2}'})


def test_errors_are_as_described(call: Caller, running: HttpServer, videos: list[Path]) -> None:
    url, infer = "/predictions/tiny", "/v2/models/tiny/infer"
    for status, sent in (
        (400, {"content": b"no video"}),
        (413, {"content": b"\0" * 5_000_000}),
        (415, {"content": b"x", "headers": {"Content-Encoding": "gzip"}}),
        (422, {"content": videos[0].read_bytes(), "params": {"top_k": 0}}),
    ):
        call("POST", url, status, **sent)
    with running.admission.taking(2):
        call("POST", url, 429, content=b"x")
        call("POST", infer, 429, content=b"x")
    call("POST", infer, 400, content=b"x")
    running.service.drain()
    try:
        call("POST", url, 503, content=b"x")
        tensor = {"name": "video", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}
        assert call("POST", infer, 503, json={"inputs": [tensor]})["item"] == 0
    finally:
        running.service._draining = False


def test_what_is_asked_with_get_is_as_described(call: Caller, document: dict[str, Any]) -> None:
    asked = [path for path, item in document["paths"].items() if "get" in item]
    for path in asked:
        call("GET", path, 200)
    assert {"/ping", "/ready", "/v2", "/v2/models/tiny"} <= set(asked)


def test_tensors_are_as_described(call: Caller, document: dict[str, Any], videos: list[Path]) -> None:
    video = base64.b64encode(videos[0].read_bytes()).decode()
    body = {"id": "1", "inputs": [{"name": "video", "datatype": "BYTES", "shape": [1], "data": [video]}]}
    schema = {**document["components"]["schemas"]["TensorRequest"], "components": document["components"]}
    Draft202012Validator(schema).validate(body)
    for path in ("/v2/models/tiny/infer", "/v2/models/tiny/versions/1.0/infer"):
        call("POST", path, 200, json=body)


def test_the_options_are_those_that_are_read(call: Caller, videos: list[Path]) -> None:
    good: dict[str, Any] = {"top_k": 1, "num_clips": 2, "outputs": ["inter"], "timings": True}
    schema = call._document["components"]["schemas"]["Options"]
    read = {*good, "timeline"}
    assert set(schema["properties"]) == set(json_schema(Options)["properties"]) == read, (
        "give a value of it here"
    )
    validator = Draft202012Validator(schema)
    video = base64.b64encode(videos[0].read_bytes()).decode()
    right: list[dict[str, Any]] = [*({name: value} for name, value in good.items()), good, {}]
    right += [{"timeline": True}, {"timeline": False}, {"timeline": {"hop": 2}, "timings": True}]
    wrong: list[dict[str, Any]] = [
        {"topk": 1}, {"top_k": "1"}, {"outputs": ["logits"]}, {"outputs": "inter"}, {"timings": 1},
        {"timeline": {"hops": 2}},
    ]  # fmt: skip
    for status, cases in ((200, right), (422, wrong)):
        for options in cases:
            assert validator.is_valid(options) == (status == 200), options
            call("POST", "/predictions/tiny", status, json={"video": video, "options": options})
