"""Action recognition from unlabelled video: train, export, verify, serve, score, measure.

::

    import ivdr_deploy as ivdr

    with ivdr.load("bundle") as model:
        print(model.predict("video.mp4").top(3))

What is listed in ``__all__`` is the public interface. It is loaded when it is used: importing this package is quick,
and neither it nor anything in the interface loads torch unless a checkpoint is opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivdr_deploy.api import Model, load
    from ivdr_deploy.datasets.lists import VideoItem, VideoList, read_video_list
    from ivdr_deploy.errors import (
        ArtifactError,
        CheckpointError,
        ConfigError,
        DataError,
        InferenceError,
        IvdrError,
        MissingDependencyError,
        OptionError,
        ServerError,
        VideoError,
        VideoOpenError,
    )
    from ivdr_deploy.events import Event, TimelinePlan
    from ivdr_deploy.results import Outcome, RemoteResult, VideoResult
    from ivdr_deploy.scoring import ScoreSummary, read_scores
    from ivdr_deploy.serving.remote.client import AsyncClient, Client
    from ivdr_deploy.serving.remote.retrying import Retry
    from ivdr_deploy.spec import ClipSpec, ViewPlan
    from ivdr_deploy.timeline import TimelineEnd, Window
    from ivdr_deploy.video.reader import VideoInfo, VideoLimits

__version__ = "0.1.0"

_HOMES = {
    "api": ("Model", "load"),
    "datasets.lists": ("VideoItem", "VideoList", "read_video_list"),
    "errors": (
        "ArtifactError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "InferenceError",
        "IvdrError",
        "MissingDependencyError",
        "OptionError",
        "ServerError",
        "VideoError",
        "VideoOpenError",
    ),
    "events": ("Event", "TimelinePlan"),
    "results": ("Outcome", "RemoteResult", "VideoResult"),
    "scoring": ("ScoreSummary", "read_scores"),
    "serving.remote.client": ("AsyncClient", "Client"),
    "serving.remote.retrying": ("Retry",),
    "spec": ("ClipSpec", "ViewPlan"),
    "timeline": ("TimelineEnd", "Window"),
    "video.reader": ("VideoInfo", "VideoLimits"),
}
"""Module -> public names that live in it."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArtifactError",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "ClipSpec",
    "ConfigError",
    "DataError",
    "Event",
    "InferenceError",
    "IvdrError",
    "MissingDependencyError",
    "Model",
    "OptionError",
    "Outcome",
    "RemoteResult",
    "Retry",
    "ScoreSummary",
    "ServerError",
    "TimelineEnd",
    "TimelinePlan",
    "VideoError",
    "VideoInfo",
    "VideoItem",
    "VideoLimits",
    "VideoList",
    "VideoOpenError",
    "VideoResult",
    "ViewPlan",
    "Window",
    "__version__",
    "load",
    "read_scores",
    "read_video_list",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
