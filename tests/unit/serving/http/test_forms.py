"""Forms whose words about themselves would cost a server more than reading them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from ivdr_deploy.errors import EncodingError, RequestError
from ivdr_deploy.serving.core.parsing import parse_request
from ivdr_deploy.serving.http.requests import envelope, read_parts

FORM = b'--x\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n\xff3\r\n--x--\r\n'


def parts_of(content_type: str) -> dict[str, Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": FORM}

    headers = [(b"content-type", content_type.encode("latin-1"))]
    scope = {"type": "http", "method": "POST", "headers": headers, "query_string": b""}
    return asyncio.run(read_parts(Request(scope, receive), most=1000, seconds=10.0))


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-16", "cp037", "x" * 10_000, '"idna"'])
def test_a_form_in_another_character_set_is_refused_by_name(charset: str) -> None:
    with pytest.raises(RequestError, match=r"the form says that it is in .*, expected UTF-8") as caught:
        parts_of(f"multipart/form-data; boundary=x; CharSet={charset}")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "said",
    [
        "charset=utf-8; charset=undefined",
        "charset=utf-8;CHARSET = undefined",
        'charset="utf-8"; charset="undefined"',
        "charset=utf-8; charset=utf-8; charset=punycode",
        'x="; charset=utf-8"; charset=undefined',
        "charset=",
    ],
)
def test_no_character_set_hides_behind_another(said: str) -> None:
    with pytest.raises(RequestError, match=r"the form says that it is in .*, expected UTF-8"):
        parts_of(f"multipart/form-data; boundary=x; {said}")


@pytest.mark.parametrize(
    "said", ["", "; charset=utf-8", '; charset="UTF-8"; x=y', "; charset=us-ascii", '; x="; charset=cp037"']
)
def test_a_form_in_utf_8_is_read(said: str) -> None:
    assert list(parts_of(f"multipart/form-data; boundary=x{said}")) == ["top_k"]


def test_an_encoding_hides_behind_no_other_header() -> None:
    headers = [(b"content-encoding", b"identity"), (b"content-encoding", b"gzip")]
    request = Request({"type": "http", "method": "POST", "headers": headers, "query_string": b""})
    with pytest.raises(EncodingError, match="identity, gzip"):
        parse_request({"body": b"x"}, envelope(request))
