"""What one service does, as data, whatever server carries its requests."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.spec import MAX_BATCH, MAX_CLIPS, Device, ViewPlan
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.urls import UrlSettings

T = TypeVar("T")

ENDPOINT_LIMITS = VideoLimits(
    max_bytes=64 << 20, max_seconds=600.0, max_frames=36_000, max_decode_seconds=20.0
)
"""Tighter than for files of one's own: somebody waits for the answer, and the sender may be anybody."""

MAX_SECONDS = 1e6
"""Of any time in the settings, eleven days."""

REQUEST_OVERHEAD_BYTES = 1 << 20
"""What a request may carry besides the video: options, multipart borders, JSON syntax."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """What one service does."""

    variant: str | None = None
    """Which of the bundle's variants runs; None takes the best verified one that fits this machine."""

    device: Device | None = None
    """Where the network runs; never another one in its place. None: the GPU where the variant can use it."""

    threads: int | None = None
    """Threads of one operator on the CPU; None: one for a core, shared among the workers of a server."""

    decode_workers: int = 4
    """Processes that decode, one request each at a time. One that dies or hangs costs its request alone."""

    decode_memory_mib: int = 2048
    """Memory in MiB that each of them may take."""

    top_k: int = 5
    """Predictions in an answer whose request does not ask for a number."""

    num_clips: int | None = None
    """Clips taken from a video whose request does not ask for a number; None takes the bundle's view plan as it is."""

    max_clips: int = 64
    """Most clips that one request may cost, the spatial crops of the view plan included."""

    batch_clips: int = MAX_BATCH
    """Most clips in one call of the network, of however many requests: fewer shorten what a request waits behind."""

    max_timelines: int = 2
    """Long videos that are looked through at the same time, each with a decode process of its own; one more is
    answered 429."""

    timeline_seconds: float = 300.0
    """Time that looking through one may take."""

    limits: VideoLimits = ENDPOINT_LIMITS
    """What one video may cost."""

    urls: UrlSettings = field(default_factory=UrlSettings)
    """Whether and from where videos are fetched that requests name by URL; from nowhere unless hosts are named."""

    def __post_init__(self) -> None:
        for name in ("decode_workers", "decode_memory_mib", "top_k", "num_clips", "threads", "max_timelines"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        check_seconds("timeline_seconds", self.timeline_seconds)
        check_seconds("urls.seconds", self.urls.seconds)
        if not 1 <= self.batch_clips <= MAX_BATCH:
            raise ConfigError(f"batch_clips must be between 1 and {MAX_BATCH}, found {self.batch_clips}")
        if not 1 <= self.max_clips <= MAX_CLIPS:
            raise ConfigError(f"max_clips must be between 1 and {MAX_CLIPS}, found {self.max_clips}")
        if (self.num_clips or 1) > self.max_clips:
            raise ConfigError(
                f"num_clips {self.num_clips} is more than max_clips {self.max_clips}, the most of a request",
                hint="raise max_clips, or lower num_clips",
            )

    @property
    def max_request_bytes(self) -> int:
        """Largest request body: the largest video, in base64 (4 characters for 3 bytes)."""
        return math.ceil(self.limits.max_bytes / 3) * 4 + REQUEST_OVERHEAD_BYTES

    @property
    def slow_seconds(self) -> float:
        """Longest time that a request may take besides decoding and the network: fetching, and looking through.

        The time of a timeline is looked at between two lots of windows.
        """
        fetching = self.urls.seconds if self.urls.hosts else 0.0
        return fetching + self.timeline_seconds + self.limits.max_decode_seconds

    def view_plan(self, plan: ViewPlan) -> ViewPlan:
        """Return what a request gets that asks for nothing.

        Args:
            plan: The bundle's.

        Raises:
            ConfigError: if that is more than ``max_clips``.
        """
        most = self.max_clips // plan.spatial_crops
        num_clips = self.num_clips or plan.num_clips
        if num_clips > most:
            source = "num_clips" if self.num_clips else "the bundle's view plan"
            raise ConfigError(
                f"{source} takes {num_clips} clips of a video, each {plan.spatial_crops} times; max_clips is "
                f"{self.max_clips}",
                hint=f"raise max_clips, or set num_clips to at most {most}",
            )
        return replace(plan, num_clips=num_clips)


def check_seconds(name: str, seconds: float) -> None:
    """Refuse a time that is none, or longer than the system can wait: whoever waited for it would end at once.

    Raises:
        ConfigError: if it is one.
    """
    if not 0 < seconds <= MAX_SECONDS:
        raise ConfigError(f"{name} must be positive and at most {MAX_SECONDS:g}, found {str(seconds)[:20]}")


def read_settings(path: Path, kind: type[T]) -> T:
    """Read a TOML file with the keys of a server's settings; what it does not name keeps its default.

    Args:
        path: The file.
        kind: The server's dataclass, which holds those of the service as ``service``.

    Raises:
        ConfigError: if it cannot be read, or has an unknown key or a wrong value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not TOML, not UTF-8, too many digits
        raise ConfigError(f"{path} cannot be read as TOML ({reason_of(error)})") from error
    service = values.get("service")
    if isinstance(service, dict) and isinstance(limits := service.get("limits"), dict):
        # A limit that is not named keeps the endpoint's default, not the looser one of VideoLimits.
        values["service"] = {**service, "limits": {**to_dict(ENDPOINT_LIMITS), **limits}}
    return from_dict(kind, values, where=str(path))
