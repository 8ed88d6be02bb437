"""``ivdr predict --timeline``: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivdr_deploy._console import print_json, print_line, print_text
from ivdr_deploy._text import as_text
from ivdr_deploy.errors import ConfigError, InferenceError, VideoError
from ivdr_deploy.events import TimelinePlan

if TYPE_CHECKING:
    from ivdr_deploy.events import Event
    from ivdr_deploy.pipeline import VideoPredictor
    from ivdr_deploy.timeline import TimelineEnd, Window


def chosen_timeline(*, wanted: bool, num_clips: int | None, **given: float | None) -> TimelinePlan | None:
    """Return how to look through the videos, None where that was not asked for.

    Raises:
        ConfigError: if an option does not go with the others, or a threshold means nothing.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        if chosen:
            name = next(iter(chosen)).replace("_", "-")
            raise ConfigError(f"--{name} is for a timeline", hint="add --timeline")
        return None
    if num_clips is not None:
        raise ConfigError(
            "--num-clips does not go with --timeline, which looks at the whole video",
            hint="leave it out; --hop says how close the windows are",
        )
    return TimelinePlan(**chosen)  # type: ignore[arg-type]  # hop is a whole number there, too


def print_timelines(
    predictor: VideoPredictor, videos: Sequence[Path], plan: TimelinePlan, *, top_k: int, as_json: bool
) -> int:
    """Print what happens in some videos, each line as soon as it is known; returns how many could not be used."""
    from ivdr_deploy.timeline import look_through

    failures = 0
    for video in videos:
        uri = as_text(video)
        try:
            for found in look_through(predictor, video, plan):
                _print(uri, *_described(found, top_k), as_json=as_json)
        except (VideoError, InferenceError) as error:
            failures += 1
            _print(uri, "error", error.to_dict(), f"error {error.code}: {error}", as_json=as_json)
    return failures


def _print(uri: str, kind: str, values: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"uri": uri, kind: values})
    elif kind == "summary":  # for people: no result
        print_text(f"{uri}: {text}")
    else:
        print_line(f"{uri}: {text}")


def _described(found: Window | Event | TimelineEnd, top_k: int) -> tuple[str, dict[str, Any], str]:
    """Return the kind of what was found, as JSON, and for people."""
    from ivdr_deploy.timeline import describe_found

    kind, values = describe_found(found, top_k=top_k)
    if kind == "summary":
        return kind, values, f"{values['windows']} windows, {values['events']} events"
    span = f"{values['start_seconds']:8.2f} to {values['end_seconds']:8.2f} s"
    if kind == "event":
        return kind, values, f"{span}  event {values['label']} {values['score']:.3f}"
    tops = "  ".join(f"{top['label']} {top['score']:.3f}" for top in values["predictions"])
    return kind, values, f"{span}  {tops}"
