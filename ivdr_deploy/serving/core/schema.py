"""What a request may look like, and what the answers look like, whatever server carries them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ivdr_deploy import __version__
from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError, OptionError
from ivdr_deploy.events import TimelinePlan
from ivdr_deploy.records import to_dict
from ivdr_deploy.results import VideoResult
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ViewPlan

OutputChoice = Literal["labels", "feature", "inter", "intra"]

METHODS = ("POST", "PUT")
"""Of HTTP that carry a request."""


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


def describe_loaded(model: LoadedModel) -> dict[str, Any]:
    """Return what whoever looks after an endpoint is told of its model, and how it was proved."""
    return {
        **describe_model(model),
        "reason": model.reason,
        "labels": list(model.labels),
        "outputs": list(model.output_names),
        "runtime": model.runtime.description,
        "golden_max_abs_diff": dict(model.golden_max_abs_diff),
        "decode_mean_diff": dict(model.decode_mean_diff),
        "ivdr_version": __version__,
    }
