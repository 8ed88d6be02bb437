"""What a request may look like, and what the answers look like, whatever server carries them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ivdr_deploy.errors import ConfigError, OptionError, RequestError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.results import VideoResult
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ViewPlan

OutputChoice = Literal["labels", "feature", "inter", "intra"]

_FORMS = (
    "send the video's bytes as the body (curl -T video.mp4 URL), or JSON "
    '{"video": BASE64, "options": {...}}, or a multipart form with the part "video" and perhaps "options"'
)


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

    def __post_init__(self) -> None:
        for name in ("top_k", "num_clips"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {str(value)[:20]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictRequest:
    """One request, taken apart."""

    video: bytes
    """The encoded file."""

    options: Options


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One answer."""

    status: int
    """HTTP status."""

    body: dict[str, Any]

    def to_json(self) -> str:
        """Serialise the body; every number in it is finite."""
        return json.dumps(self.body, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _JsonBody:
    video: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_request(parts: Mapping[str, Any]) -> PredictRequest:
    """Take one request apart.

    Args:
        parts: The named parts of the request. A plain body is the part ``body``: bytes, or what a server has
            already parsed from JSON. A form has the parts ``video`` (or ``data``) and perhaps ``options``.

    Raises:
        RequestError: if it has none of these forms.
        OptionError: if an option is unknown or out of range.
    """
    if set(parts) == {"body"}:
        return _parse_body(parts["body"])
    names = set(parts) - {"options"}
    if names not in ({"video"}, {"data"}):
        raise RequestError(
            f"the request has the parts {sorted(parts) or 'none'}, expected a video", hint=_FORMS
        )
    video = parts[names.pop()]
    if not isinstance(video, bytes | bytearray):
        raise RequestError(
            f"the video part holds {type(video).__name__}, expected the bytes of a file", hint=_FORMS
        )
    options = parts.get("options", {})
    if isinstance(options, bytes | bytearray | str):
        options = _parse_json(options, what="the options part")
    return PredictRequest(video=bytes(video), options=parse_options(options))


def parse_options(values: object) -> Options:
    """Check the options of a request.

    Raises:
        OptionError: if they are not a table of known options in range.
    """
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
                f"options: this model has no output {name!r}", hint=f"it has: {', '.join(held)}"
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
    body["model"] = {
        "name": model.name,
        "version": model.version,
        "variant": model.variant,
        "contract_hash": model.contract_hash,
    }
    return body


def is_finite(result: VideoResult) -> bool:
    """Whether every number of a result can be answered; JSON has no NaN."""
    arrays = (result.probabilities, result.feature, result.inter, result.intra, result.clip_seconds)
    return all(bool(np.isfinite(array).all()) for array in arrays if array is not None)


def _parse_body(body: object) -> PredictRequest:
    if isinstance(body, bytes | bytearray):
        if not body:
            raise RequestError("the request is empty", hint=_FORMS)
        if body.lstrip()[:1] != b"{":  # no container begins like a JSON object
            return PredictRequest(video=bytes(body), options=Options())
    if isinstance(body, bytes | bytearray | str):
        body = _parse_json(body, what="the body")
    try:
        values = from_dict(_JsonBody, body, where="the request")  # type: ignore[arg-type]  # it checks that itself
        video = base64.b64decode(values.video, validate=True)
    except ConfigError as error:
        raise RequestError(error.message, hint=error.hint or _FORMS) from error
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the request: video is not base64 ({error})", hint=_FORMS) from error
    return PredictRequest(video=video, options=parse_options(values.options))


def _parse_json(text: bytes | bytearray | str, *, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{what} is not JSON ({error})", hint=_FORMS) from error
