from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import pytest

from ivdr_deploy.errors import EncodingError, MethodError, OptionError, RequestError
from ivdr_deploy.serving.core.parsing import parse_options, read_json
from ivdr_deploy.serving.core.parsing import parse_request as parse_with_envelope
from ivdr_deploy.serving.core.schema import Envelope, Options, PredictRequest, Response

VIDEO = b"\x00\x00\x00\x18ftypmp42"
ENCODED = base64.b64encode(VIDEO).decode()


def parse_request(parts: dict[str, Any]) -> PredictRequest:
    return parse_with_envelope(parts, Envelope())


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
        ({"body": b'{"video": "AAAA", "options": {"top_k": 1, "top_k": 2}}'}, "'top_k' is given twice"),
        ({"body": b'{"video": [' + b"{}," * 6_000 + b"0]}"}, "holds more than 10000 values"),
        ({"video": VIDEO, "options": '{"top_k": [' + "[]," * 6_000 + "0]}"}, "holds more than 10000 values"),
        ({"video": VIDEO, "top_k": "[" + "[]," * 6_000 + "0]"}, "'top_k' holds more than 10000 values"),
        ({"video": VIDEO, "outputs": b"," * 10_001}, "'outputs' holds more than 10000 values"),
        ({"video": VIDEO, "timeline": b'{"hop": 1, "hop": 2}'}, "'hop' is given twice"),
        ({"body": [1, 2]}, "expected a table"),
        ({"body": {"options": {}}}, "none of video and video_url"),
        ({"body": {"video": 5}}, "expected str"),
        ({"body": {"video": "not+base64!"}}, "'!' at character 10"),
        ({"body": {"video": "AA\u00e9A"}}, "'?' at character 2"),
        ({"body": {"video": "AAAAA"}}, "5 characters, not a multiple of 4"),
        ({"body": {"video": "AA==AA=="}}, "before its end"),
        ({"body": {"video": "data:video/mp4,AAAA"}}, "data URL without ';base64,'"),
        ({"body": {"video": "data:" + "x" * 1000}}, "data URL without ';base64,'"),
        ({"body": b"{" + b"[" * 9_000}, "not JSON"),
        ({"body": '{"video": ' + "[" * 9_000 + "]" * 9_000 + "}"}, "not JSON"),
        ({"body": b'{"video": ' + b"9" * 5000 + b"}"}, "not JSON"),
        ({"body": b'{"video": "\xff"}'}, "not JSON"),
        ({"video": VIDEO, "options": b"[" * 9_000}, "not JSON"),
        ({"body": {"video": ENCODED, "url": "http://example.org"}}, "unknown key 'url'"),
        ({"file": VIDEO}, "the parts 'file', expected a video"),
        (dict.fromkeys("abcdefg", VIDEO), "the parts 'a', 'b', 'c', 'd', 'e' and 2 more, expected a video"),
        ({"video": VIDEO, "data": VIDEO}, "the parts video and data"),
        ({"body": VIDEO, "video": b"x"}, "the parts body and video"),
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
        ({"timelines": True}, "did you mean 'timeline'"),
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


@pytest.mark.parametrize(
    "text",
    [
        base64.encodebytes(VIDEO * 20).decode(),
        base64.encodebytes(VIDEO * 20).decode().replace("\n", "\r\n"),
        "data:video/mp4;base64," + base64.b64encode(VIDEO * 20).decode(),
        "DATA:;BASE64," + base64.encodebytes(VIDEO * 20).decode(),
    ],
    ids=["line-breaks", "crlf", "data-url", "data-url-with-line-breaks"],
)
def test_every_spelling_of_base64_is_read(text: str) -> None:
    assert parse_request({"body": {"video": text}}).video == VIDEO * 20


def test_alphabet_for_urls_is_read() -> None:
    data = bytes(range(256))
    assert "-" in base64.urlsafe_b64encode(data).decode()
    assert parse_request({"body": {"video": base64.urlsafe_b64encode(data).decode()}}).video == data


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_json_may_begin_with_a_byte_order_mark(mark: bytes) -> None:
    body = mark + json.dumps({"video": ENCODED}).encode()
    assert parse_request({"body": body}).video == VIDEO
    assert parse_request({"body": body.decode()}).video == VIDEO
    assert parse_request({"body": mark + VIDEO}).video == mark + VIDEO, "only JSON has such a mark"


@pytest.mark.parametrize("body", [VIDEO, {"video": ENCODED}, json.dumps({"video": ENCODED}).encode()])
def test_query_and_form_fields_are_options(body: Any) -> None:
    query = {"top_k": bytearray(b"2"), "outputs": bytearray(b"labels,intra"), "timings": bytearray(b"true")}
    expected = Options(top_k=2, outputs=("labels", "intra"), timings=True)
    assert parse_request({"body": body, **query}).options == expected
    assert parse_request({"video": VIDEO, **query}).options == expected
    assert parse_request({"video": VIDEO, **query, "outputs": '["labels", "intra"]'}).options == expected
    mixed = parse_request({"body": {"video": ENCODED, "options": {"top_k": 2}}, "num_clips": "3"}).options
    assert mixed == Options(top_k=2, num_clips=3)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"topk": b"1"}, "did you mean 'top_k'"),
        ({"top_k": b""}, "expected int, found ''"),
        ({"top_k": b"one"}, "expected int, found 'one'"),
        ({"top_k": b"1.5"}, "expected int, found 1.5"),
        ({"top_k": b"9" * 5000}, "expected int"),
        ({"top_k": b"[" * 9_000}, "expected int"),
        ({"top_k": b"\xff"}, "expected int"),
        ({"timings": b"yes"}, "expected bool"),
        ({"outputs": b"logits"}, "expected one of"),
        ({"x" * 1_000_000: b""}, "unknown key"),
        ({"options": b'{"top_k": 2}', "top_k": b"1"}, "'top_k' is given twice"),
        ({"options": b"[1]"}, "expected a table"),
    ],
)
def test_query_that_is_no_option_is_refused(query: dict[str, Any], said: str) -> None:
    for request in ({"body": VIDEO}, {"body": {"video": ENCODED}}, {"video": VIDEO}):
        with pytest.raises(OptionError) as caught:
            parse_request({**query, **request})
        assert said in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "PATCH", "x" * 1000])
def test_method_that_carries_no_request_is_told_from_an_empty_request(method: str) -> None:
    with pytest.raises(MethodError, match=f"'{method[:40]}.* is not answered here, expected POST or PUT"):
        parse_with_envelope({"body": b""}, Envelope(method=method))
    assert parse_with_envelope({"body": VIDEO}, Envelope(method="PUT")).video == VIDEO


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "identity, gzip", "x" * 100_000])
def test_body_encoded_for_the_transfer_is_refused_by_name(encoding: str) -> None:
    with pytest.raises(EncodingError, match=encoding[:50]) as caught:
        parse_with_envelope({"body": VIDEO}, Envelope(content_encoding=encoding))
    assert len(caught.value.message) < 200
    for same in ("", "identity", " Identity "):
        assert parse_with_envelope({"body": VIDEO}, Envelope(content_encoding=same)).video == VIDEO


LONG = "A" * 5_000_000


@pytest.mark.parametrize(
    "parts",
    [
        {"body": [{"video": LONG}]},
        {"body": {"video": LONG + "!"}},
        {"body": {"video": [LONG]}},
        {"body": {"video": ENCODED, "options": LONG}},
        {"body": {"video": ENCODED, "options": {LONG: 1}}},
        {"body": {"video": ENCODED, "options": {"top_k": LONG}}},
        {"body": {"video": ENCODED, "options": {"outputs": [LONG]}}},
        {"body": {"video": ENCODED, "options": {"outputs": {LONG: LONG}}}},
        {"body": {"video": ENCODED, LONG: 1}},
        {"body": LONG},
        {"video": LONG},
        {"video": VIDEO, "options": LONG},
        {"video": VIDEO, LONG: b""},
        {"video": VIDEO, "top_k": LONG},
        {LONG: VIDEO},
        {"body": VIDEO, "video": VIDEO, LONG: VIDEO},
    ],
    ids=range(16),
)
def test_refusal_shows_little_of_what_was_sent(parts: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(parts)
    assert max(map(len, re.findall("A+", str(caught.value))), default=0) <= 100
    assert len(str(caught.value)) < 600


def test_nested_values_of_any_depth_are_shown_cut_short() -> None:
    # What another parser has read may be nested more deeply than Python's own repr follows.
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RequestError, match="expected a table"):
        parse_request({"body": nested})
    with pytest.raises(OptionError, match="expected int"):
        parse_request({"video": VIDEO, "options": {"top_k": nested}})


def test_answer_is_utf8_whatever_text_is_in_it() -> None:
    body = {"label": "caf\udce9", "other": "\u00e9"}
    assert json.loads(Response(status=200, body=body).json) == body
    assert "\u00e9".encode() in Response(status=200, body=body).json


def test_a_name_given_twice_is_found_at_once_among_many() -> None:
    names = [*map(str, range(100_000)), "99999"]
    text = json.dumps(names)[1:-1].replace(",", ":0,")
    begin = time.process_time()
    with pytest.raises(RequestError, match="'99999' is given twice"):
        read_json(f"{{{text}:0}}", most_values=200_000, what="the body", hint="")
    assert time.process_time() - begin < 20, "looking for each name among all others takes minutes"
