"""What a request may look like, and what the answers look like, whatever server carries them."""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError, EncodingError, MethodError, OptionError, RequestError
from ivdr_deploy.events import TimelinePlan
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.results import VideoResult
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ViewPlan

OutputChoice = Literal["labels", "feature", "inter", "intra"]

METHODS = ("POST", "PUT")
"""Of HTTP that carry a request."""

_FORMS = (
    "send the video's bytes as the body (curl -T video.mp4 URL), or JSON "
    '{"video": BASE64, "options": {...}} or {"video_url": URL, ...}, or a multipart form with the part "video" and '
    'perhaps "options"'
)

_DATA_URL_HEAD = 200
"""Characters in which the head of a data URL must end."""

_TO_BASE64 = bytes.maketrans(b"-_", b"+/")
"""From the alphabet for URLs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a client may choose for one video; every other key is refused."""

    top_k: int | None = None
    """Predictions wanted, best first; None takes the endpoint's number."""

    num_clips: int | None = None
    """Clips taken from the video; None takes the endpoint's number. The endpoint's ``max_clips`` bounds it."""

    outputs: tuple[OutputChoice, ...] | None = None
    """What to answer; None is the labels, or all there is where the model has no classifier."""

    timings: bool = False
    """Whether to answer how long each stage took."""

    timeline: TimelinePlan | None = None
    """How to look through the whole video, window by window; ``true`` takes the defaults. None: its clips are
    averaged."""

    def __post_init__(self) -> None:
        for name in ("top_k", "num_clips"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {str(value)[:20]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """What HTTP says about a request besides its parts."""

    method: str = "POST"
    content_encoding: str = ""
    """Of the body; empty or ``identity`` is as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictRequest:
    """One request, taken apart."""

    video: bytes
    """The encoded file; empty where there is a URL."""

    options: Options
    video_url: str | None = None
    """Where the file is to be fetched."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer."""

    status: int
    """HTTP status."""

    body: dict[str, Any]
    """What goes out as JSON; of an answer in tensors (``core.oip``) its arrays by name."""

    headers: dict[str, str] = field(default_factory=dict)
    """HTTP headers that belong to the status."""

    @cached_property
    def json(self) -> bytes:
        """The body as UTF-8; every number in it is finite."""
        text = json.dumps(self.body, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes what JSON spells it as


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
            f"{envelope.method[:40]} is not answered here, expected {' or '.join(METHODS)}", hint=_FORMS
        )
    if envelope.content_encoding.strip().lower() not in ("", "identity"):
        raise EncodingError(
            f"the body has the Content-Encoding {quoted(envelope.content_encoding)}, expected none",
            hint="send the file as it is; videos are compressed already",
        )
    if not (found := [name for name in ("body", "video", "data") if name in parts]):
        names = ", ".join(quoted(name) for name in sorted(parts)[:5])
        raise RequestError(f"the request has the parts {names or 'none'}, expected a video", hint=_FORMS)
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


def chosen_outputs(options: Options, model: LoadedModel) -> tuple[OutputChoice, ...]:
    """Return what to answer for this model.

    Raises:
        OptionError: if something is asked for that the model does not have.
    """
    held: list[OutputChoice] = ["labels"] if "logits" in model.output_names else []
    held += [name for name in ("feature", "inter", "intra") if name in model.output_names]
    if options.outputs is None:
        return ("labels",) if "labels" in held else tuple(held)
    for name in options.outputs:
        if name not in held:
            raise OptionError(
                f"options: this model has no output {quoted(name)}", hint=f"it has: {', '.join(held)}"
            )
    return options.outputs


def chosen_plan(options: Options, plan: ViewPlan, *, max_clips: int) -> ViewPlan:
    """Return which clips of the video are looked at.

    Args:
        options: Of the request.
        plan: The endpoint's.
        max_clips: Most clips that a request may cost, spatial crops included.

    Raises:
        OptionError: if the request asks for more.
    """
    if options.num_clips is None:
        return plan
    most = max_clips // plan.spatial_crops
    if options.num_clips > most:
        raise OptionError(
            f"options: num_clips must be between 1 and {most}, found {str(options.num_clips)[:20]}",
            hint="ask for fewer clips",
        )
    return replace(plan, num_clips=options.num_clips)


def describe_result(
    result: VideoResult, model: LoadedModel, *, options: Options, top_k: int
) -> dict[str, Any]:
    """Build the body of an answer.

    Args:
        result: What the network said.
        model: The model that said it.
        options: What the client asked for.
        top_k: Predictions to give when the client did not say.
    """
    outputs = chosen_outputs(options, model)
    body: dict[str, Any] = {}
    if "labels" in outputs:
        top = result.top(options.top_k or top_k)
        body["predictions"] = [{"label": label, "score": score} for label, score in top]
    for name in ("feature", "inter", "intra"):
        if name in outputs:
            body[name] = getattr(result, name).tolist()
    if "intra" in outputs:
        body["clip_seconds"] = result.clip_seconds.tolist()
    body["video"] = to_dict(result.info)
    if options.timings:
        body["timings"] = {
            "decode_ms": result.decode_ms,
            "preprocess_ms": result.preprocess_ms,
            "infer_ms": result.infer_ms,
        }
    body["view_plan"] = to_dict(result.view_plan)
    body["model"] = describe_model(model)
    return body


def describe_model(model: LoadedModel) -> dict[str, Any]:
    """Return what every answer says of the model that gave it."""
    return {
        "name": model.name,
        "version": model.version,
        "variant": model.variant,
        "contract_hash": model.contract_hash,
    }


def _parse_body(body: object) -> tuple[bytes | bytearray, str | None, dict[str, Any]]:
    """Return the video of a plain body or its URL, and the options beside it."""
    if isinstance(body, bytes | bytearray):
        if not body:
            raise RequestError("the request is empty", hint=_FORMS)
        text = body.removeprefix(codecs.BOM_UTF8)
        if text.lstrip()[:1] != b"{":  # no container begins like a JSON object
            return body, None, {}
        body = text
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
    if name == "outputs" and not value.startswith("["):
        return value.split(",")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # refused by its type


def _parse_json(text: bytes | bytearray | str, *, what: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON ({str(error)[:100]})", hint=_FORMS) from error
