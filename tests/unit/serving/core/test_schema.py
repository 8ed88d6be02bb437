from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from ivdr_deploy.errors import OptionError, RequestError
from ivdr_deploy.serving.core.schema import Options, parse_options, parse_request

VIDEO = b"\x00\x00\x00\x18ftypmp42"
ENCODED = base64.b64encode(VIDEO).decode()
OPTIONS = {"top_k": 2, "outputs": ["labels", "intra"], "timings": True}


@pytest.mark.parametrize(
    "parts",
    [
        {"body": {"video": ENCODED, "options": OPTIONS}},
        {"body": json.dumps({"video": ENCODED, "options": OPTIONS})},
        {"body": b"  " + json.dumps({"video": ENCODED, "options": OPTIONS}).encode()},
        {"video": bytearray(VIDEO), "options": json.dumps(OPTIONS).encode()},
        {"data": VIDEO, "options": OPTIONS},
    ],
    ids=["parsed-json", "json-text", "json-bytes", "form", "form-data"],
)
def test_every_form_gives_the_same_request(parts: dict[str, Any]) -> None:
    request = parse_request(parts)
    assert request.video == VIDEO
    assert request.options == Options(top_k=2, outputs=("labels", "intra"), timings=True)


def test_plain_body_is_a_video_with_default_options() -> None:
    request = parse_request({"body": bytearray(VIDEO)})
    assert (request.video, request.options) == (VIDEO, Options())


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "parts none"),
        ({"body": b""}, "empty"),
        ({"body": b'{"video": "abc'}, "not JSON"),
        ({"body": "hello"}, "not JSON"),
        ({"body": [1, 2]}, "expected a table"),
        ({"body": {"options": {}}}, "'video' is missing"),
        ({"body": {"video": 5}}, "expected str"),
        ({"body": {"video": "not base64!"}}, "not base64"),
        ({"body": {"video": ENCODED, "url": "http://example.org"}}, "unknown key 'url'"),
        ({"video": VIDEO, "extra": b""}, "'extra'"),
        ({"video": VIDEO, "data": VIDEO}, "'data'"),
        ({"video": "text"}, "str"),
        ({"video": VIDEO, "options": b"{"}, "not JSON"),
        ({"options": b"{}"}, "expected a video"),
    ],
)
def test_malformed_request_is_refused_with_what_was_found(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        parse_request(parts)
    assert not isinstance(caught.value, OptionError)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"topk": 3}, "did you mean 'top_k'"),
        ({"timeline": True}, "unknown key 'timeline'"),
        ({"top_k": 0}, "at least 1"),
        ({"top_k": "3"}, "expected int"),
        ({"top_k": True}, "expected int"),
        ({"num_clips": 0}, "at least 1"),
        ({"outputs": ["logits"]}, "expected one of"),
        ({"outputs": "labels"}, "expected a list"),
        ({"timings": 1}, "expected bool"),
        ([], "expected a table"),
    ],
)
def test_bad_option_is_refused_by_name(values: Any, said: str) -> None:
    with pytest.raises(OptionError, match="options") as caught:
        parse_options(values)
    assert said in str(caught.value)
