"""What an endpoint's answer means: a result, or an exception of the tree in ``errors``. No network in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from ivdr_deploy._text import one_line, quoted, reason_of
from ivdr_deploy.errors import (
    ConfigError,
    IvdrError,
    QueueFullError,
    ServerError,
    VideoLimitError,
)
from ivdr_deploy.records import from_dict
from ivdr_deploy.results import RemoteResult, ServedModel
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.reader import VideoInfo

T = TypeVar("T")

_MESSAGE_CHARACTERS = 1000


def result_of(content: bytes, *, request_id: str) -> RemoteResult:
    """Read an answer of status 200; what a later version of the endpoint adds is in ``RemoteResult.body`` alone.

    Raises:
        ServerError: if it is no answer of an endpoint of this kind.
    """
    try:
        body = json.loads(content)
        return RemoteResult(
            predictions=tuple(
                (entry["label"], float(entry["score"])) for entry in body.get("predictions", ())
            ),
            feature=_array(body, "feature", np.float32),
            inter=_array(body, "inter", np.float32),
            intra=_array(body, "intra", np.float32),
            clip_seconds=_array(body, "clip_seconds", np.float64),
            info=_record(VideoInfo, body["video"]),
            view_plan=_record(ViewPlan, body["view_plan"]),
            model=_record(ServedModel, body["model"]),
            timings_ms={name: float(value) for name, value in body.get("timings", {}).items()},
            request_id=request_id,
            body=body,
        )
    except (
        ConfigError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ServerError(
            f"the answer is none of an ivdr endpoint ({type(error).__name__}: {reason_of(error)})",
            hint="is the address that of its inference port?",
        ) from error


def failure_of(status: int, content: bytes) -> IvdrError:
    """Return the exception that an answer of another status stands for: the one that the endpoint raised.

    TorchServe has bodies of its own: a full queue (503), a body that is too large (413) and a worker that died.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, Mapping):
        text = content.decode("utf-8", "replace").strip()
        body = {"message": text or f"HTTP status {status} without a body"}
    code, message, hint = (_text(body.get(name, "")) for name in ("code", "message", "hint"))
    kind = next((kind for kind in _kinds(IvdrError) if kind.code == code), None)
    if kind is None:
        kind = {413: VideoLimitError, 429: QueueFullError}.get(status, ServerError)
        message = f"the endpoint answered {status}: {message or 'no reason is given'}"
    return kind(message, hint=hint)


def _text(value: object) -> str:
    """Return what a server says, as far as a message may hold it."""
    return one_line(value[:_MESSAGE_CHARACTERS]) if isinstance(value, str) else quoted(value)


def _kinds(kind: type[IvdrError]) -> Iterator[type[IvdrError]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _kinds(inner)


def _array(body: Mapping[str, Any], name: str, dtype: type) -> np.ndarray | None:
    return np.array(body[name], dtype) if name in body else None


def _record(kind: type[T], values: object) -> T:
    """Read a dataclass, without what a later version added to it."""
    if not isinstance(values, Mapping):
        raise TypeError(f"expected a table, found {quoted(values)}")
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    kept = {name: value for name, value in values.items() if name in known}
    return from_dict(kind, kept, where="the answer")
