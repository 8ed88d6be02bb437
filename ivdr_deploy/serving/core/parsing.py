"""Takes a request apart, whatever server carries it: its parts become a video, or where it is, and options."""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ivdr_deploy._text import quoted, quoted_few, reason_of
from ivdr_deploy.errors import ConfigError, EncodingError, MethodError, OptionError, RequestError
from ivdr_deploy.records import from_dict
from ivdr_deploy.serving.core.schema import METHODS, Envelope, Options, PredictRequest

_FORMS = (
    "send the video's bytes as the body (curl -T video.mp4 URL), or JSON "
    '{"video": BASE64, "options": {...}} or {"video_url": URL, ...}, or a multipart form with the part "video" and '
    'perhaps "options"'
)

_DATA_URL_HEAD = 200
"""Characters in which the head of a data URL must end."""

_MOST_VALUES = 10_000
"""In the JSON of a request. A video in base64 is one; others that cost two bytes to send would take sixty each."""

_JSON_OBJECT = re.compile(rb"(?:%s)?\s*\{" % codecs.BOM_UTF8)

_TO_BASE64 = bytes.maketrans(b"-_", b"+/")
"""From the alphabet for URLs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonBody:
    """A request as JSON: one of ``video`` (base64) and ``video_url``."""

    video: str | None = None
    video_url: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def parse_request(parts: Mapping[str, Any], envelope: Envelope) -> PredictRequest:
    """Take one request apart.

    Args:
        parts: The named parts of the request. A plain body is the part ``body``: bytes, or what a server has
            already parsed from JSON. A form has the parts ``video`` (or ``data``) and perhaps ``options``. Every other
            part, of a form or of the query, is one option by its name.
        envelope: What HTTP says about it.

    Raises:
        MethodError: if its method carries no request.
        EncodingError: if its body is encoded for the transfer.
        RequestError: if it has none of these forms.
        OptionError: if an option is unknown, out of range or given twice.
    """
    if envelope.method not in METHODS:
        raise MethodError(
            f"{quoted(envelope.method)} is not answered here, expected {' or '.join(METHODS)}", hint=_FORMS
        )
    if envelope.content_encoding.strip().lower() not in ("", "identity"):
        raise EncodingError(
            f"the body has the Content-Encoding {quoted(envelope.content_encoding)}, expected none",
            hint="send the file as it is; videos are compressed already",
        )
    if not (found := [name for name in ("body", "video", "data") if name in parts]):
        raise RequestError(
            f"the request has the parts {quoted_few(sorted(parts))}, expected a video", hint=_FORMS
        )
    if len(found) > 1:
        raise RequestError(f"the request has the parts {' and '.join(found)}, expected one", hint=_FORMS)
    url: str | None = None
    if found == ["body"]:
        video, url, options = _parse_body(parts["body"])
    else:
        video, options = parts[found[0]], {}
        if not isinstance(video, bytes | bytearray):
            raise RequestError(
                f"the video part holds {type(video).__name__}, expected the bytes of a file", hint=_FORMS
            )
    single = {name: value for name, value in parts.items() if name not in (*found, "options")}
    chosen = _all_options(options, parts.get("options"), single)
    return PredictRequest(video=bytes(video), video_url=url, options=chosen)


def parse_options(values: object) -> Options:
    """Check the options of a request.

    Raises:
        OptionError: if they are not a table of known options in range.
    """
    if isinstance(values, Mapping) and isinstance(values.get("timeline"), bool):
        values = {**values, "timeline": {} if values["timeline"] else None}
    try:
        return from_dict(Options, values, where="options")  # type: ignore[arg-type]  # it checks that itself
    except ConfigError as error:
        raise OptionError(error.message, hint=error.hint) from error


def _parse_body(body: object) -> tuple[bytes | bytearray, str | None, dict[str, Any]]:
    """Return the video of a plain body or its URL, and the options beside it."""
    if isinstance(body, bytes | bytearray):
        if not body:
            raise RequestError("the request is empty", hint=_FORMS)
        if not _JSON_OBJECT.match(body):  # no container begins like one
            return body, None, {}
        body = body.removeprefix(codecs.BOM_UTF8)
    if isinstance(body, bytes | bytearray | str):
        body = _parse_json(body, what="the body")
    try:
        values = from_dict(JsonBody, body, where="the request")  # type: ignore[arg-type]  # it checks that itself
    except ConfigError as error:
        raise RequestError(error.message, hint=error.hint or _FORMS) from error
    if (values.video is None) == (values.video_url is None):
        raise RequestError(
            f"the request has {'both' if values.video else 'none'} of video and video_url, expected one",
            hint=_FORMS,
        )
    video = b"" if values.video is None else parse_base64(values.video)
    return video, values.video_url, values.options


def parse_base64(text: str) -> bytes:
    """Decode a video in base64: line breaks, the alphabet for URLs and the head of a data URL are allowed.

    Raises:
        RequestError: if it is none; says why.
    """
    head = text[:_DATA_URL_HEAD]
    if head[:5].lower() == "data:":
        head, comma, _ = head.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError("the request: video is a data URL without ';base64,'", hint=_FORMS)
        text = text[len(head) + 1 :]
    encoded = text.encode("utf-8", "replace").translate(_TO_BASE64, delete=b" \t\r\n")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise RequestError(
            f"the request: video is not base64: {_why_not_base64(encoded)}", hint=_FORMS
        ) from error


def _why_not_base64(encoded: bytes) -> str:
    if wrong := re.search(rb"[^A-Za-z0-9+/=]", encoded):
        return f"there is {chr(wrong[0][0])!a} at character {wrong.start()}, line breaks not counted"
    if re.search(rb"=[^=]", encoded):
        return "there is a '=' before its end, as where two files follow each other"
    return f"it has {len(encoded)} characters, not a multiple of 4: it was cut off, or its '=' at the end are missing"


def _all_options(beside: dict[str, Any], part: object, single: Mapping[str, Any]) -> Options:
    """Put together the options of a JSON body, of the part ``options``, and those that are parts by themselves."""
    if isinstance(part, bytes | bytearray | str):
        part = _parse_json(part, what="the options part")
    if part is not None and not isinstance(part, Mapping):
        raise OptionError(f"options: expected a table, found {quoted(part)}")
    given: dict[str, Any] = {}
    for values in (beside, part or {}, {name: _parse_single(name, value) for name, value in single.items()}):
        if twice := sorted(set(given) & set(values)):
            raise OptionError(f"options: {quoted(twice[0])} is given twice", hint="give each option once")
        given |= values
    return parse_options(given)


def _parse_single(name: str, value: object) -> Any:
    """Read an option that is text: ``top_k=3``, ``timings=true``, ``outputs=labels,inter``."""
    if isinstance(value, bytes | bytearray):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return value
    _check_values(value, most_values=_MOST_VALUES, what=f"the option {quoted(name)}", hint=_FORMS)
    if name == "outputs" and not value.startswith("["):
        return value.split(",")
    try:
        return json.loads(value, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return value  # refused by its type


def _parse_json(text: bytes | bytearray | str, *, what: str) -> Any:
    text = text.removeprefix("\ufeff") if isinstance(text, str) else text
    return read_json(text, most_values=_MOST_VALUES, what=what, hint=_FORMS)


def read_json(text: bytes | bytearray | str, *, most_values: int, what: str, hint: str) -> Any:
    """Read JSON that somebody sent.

    Args:
        text: The JSON.
        most_values: More are refused unread: they would take far more memory than their text.
        what: Name of the text, for messages.
        hint: For messages.

    Raises:
        RequestError: if it is none, holds too many values, or names something twice.
    """
    _check_values(text, most_values=most_values, what=what, hint=hint)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON ({reason_of(error, most=100)})", hint=hint) from error


def _check_values(text: bytes | bytearray | str, *, most_values: int, what: str, hint: str) -> None:
    """Count what stands between values, before there are any."""
    marks = (",", "[", "{")
    count = sum(text.count(mark) if isinstance(text, str) else text.count(mark.encode()) for mark in marks)
    if count > most_values:
        raise RequestError(f"{what} holds more than {most_values} values", hint=hint)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a table of pairs, of which JSON itself would let the last of a name count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise RequestError(f"{quoted(twice)} is given twice", hint="give each name once")
    return found
