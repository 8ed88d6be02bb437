"""Every setting of an endpoint, with its default, as data: they travel inside the archive."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.spec import Device, Precision, RuntimeName
from ivdr_deploy.video.reader import VideoLimits

ENDPOINT_LIMITS = VideoLimits(
    max_bytes=64 << 20, max_seconds=600.0, max_frames=36_000, max_decode_seconds=20.0
)
"""Tighter than for files of one's own: somebody waits for the answer, and the sender may be anybody."""

INFER_ALLOWANCE_SECONDS = 120
"""Time granted to the network for one batch, on top of decoding. TorchServe kills a worker that answers later
than ``responseTimeout``, so the decode limit must strike first and this must never be reached."""

REQUEST_OVERHEAD_BYTES = 1 << 20
"""What a request may carry besides the video: options, multipart borders, JSON syntax."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """What one worker does; the ``handler`` table of ``model-config.yaml``."""

    runtime: RuntimeName = "onnxruntime"
    """What executes the network."""

    precision: Precision = "fp32"
    """Which of the bundle's models."""

    device: Device = "cpu"
    """Where the network runs; never another one in its place."""

    threads: int | None = None
    """Threads of one operator on the CPU; None leaves the choice to the runtime."""

    decode_threads: int = 4
    """Videos of one batch that are decoded at the same time."""

    top_k: int = 5
    """Predictions in an answer whose request does not ask for a number."""

    num_clips: int | None = None
    """Clips taken from a video whose request does not ask for a number; None takes the contract's."""

    limits: VideoLimits = ENDPOINT_LIMITS
    """What one video may cost."""

    def __post_init__(self) -> None:
        for name in ("decode_threads", "top_k", "num_clips", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSettings:
    """What TorchServe does with the workers; the file given to ``ivdr archive --config`` has these keys."""

    service: ServiceSettings = field(default_factory=ServiceSettings)
    """What each worker does."""

    workers: int = 1
    """Worker processes; each loads the model (about 0.5 GB of its own) and answers one batch at a time."""

    batch_size: int = 4
    """Most requests answered together."""

    max_batch_delay_ms: int = 10
    """How long the first request of a batch waits for others; a lone request pays it in full. At least 1:
    TorchServe takes 0 for its own default, which is 100."""

    queue_size: int = 32
    """Requests that may wait; one more is answered 503 at once. Waiting videos are held in memory."""

    startup_seconds: int = 300
    """Time a worker may take to load the model and replay the golden clips."""

    def __post_init__(self) -> None:
        for name in ("workers", "batch_size", "max_batch_delay_ms", "queue_size", "startup_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.max_request_bytes >= 1 << 31:
            raise ConfigError(
                f"max_bytes {self.service.limits.max_bytes} is more than TorchServe takes in one request",
                hint="1500000000 is possible; score larger videos with `ivdr score`",
            )

    @property
    def max_request_bytes(self) -> int:
        """Largest request body: the largest video, in base64 (4 characters for 3 bytes)."""
        return math.ceil(self.service.limits.max_bytes / 3) * 4 + REQUEST_OVERHEAD_BYTES

    @property
    def response_timeout_seconds(self) -> int:
        """TorchServe's limit for one batch: longer than any batch within the decode limit can take."""
        rounds = math.ceil(self.batch_size / self.service.decode_threads)
        return math.ceil(rounds * self.service.limits.max_decode_seconds) + INFER_ALLOWANCE_SECONDS


def read_settings(path: Path) -> EndpointSettings:
    """Read a TOML file with the keys of ``EndpointSettings``; what it does not name keeps its default.

    Raises:
        ConfigError: if it cannot be read, or has an unknown key or a wrong value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML ({error})") from error
    service = values.get("service")
    if isinstance(service, dict) and isinstance(limits := service.get("limits"), dict):
        # A limit that is not named keeps the endpoint's default, not the looser one of VideoLimits.
        values["service"] = {**service, "limits": {**to_dict(ENDPOINT_LIMITS), **limits}}
    return from_dict(EndpointSettings, values, where=str(path))


def to_model_config(settings: EndpointSettings) -> str:
    """Write ``model-config.yaml``: TorchServe's own keys, and ours under ``handler`` and ``server``."""
    values = {
        "minWorkers": settings.workers,
        "maxWorkers": settings.workers,
        "batchSize": settings.batch_size,
        "maxBatchDelay": settings.max_batch_delay_ms,
        "responseTimeout": settings.response_timeout_seconds,
        "startupTimeout": settings.startup_seconds,
        "deviceType": "gpu" if settings.service.device == "cuda" else "cpu",
        "handler": to_dict(settings.service),
        "server": {"queue_size": settings.queue_size},
    }
    return str(yaml.safe_dump(values, sort_keys=False))


def from_model_config(text: str | bytes, *, where: str) -> EndpointSettings:
    """Read back what ``to_model_config`` wrote.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML ({error})") from error
    try:
        taken: Mapping[str, Any] = {
            "workers": values["minWorkers"],
            "batch_size": values["batchSize"],
            "max_batch_delay_ms": values["maxBatchDelay"],
            "startup_seconds": values["startupTimeout"],
            "queue_size": values["server"]["queue_size"],
            "service": values["handler"],
        }
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{where} was not written by `ivdr archive`: no {error}") from error
    return from_dict(EndpointSettings, taken, where=where)
