"""What TorchServe does with a service, as data: it travels inside the archive as ``model-config.yaml``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ivdr_deploy._optional import require
from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.artifacts.archive import PACK_AGAIN
from ivdr_deploy.decoding.pool import GRACE_SECONDS
from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.timeline import MOST_WAITING

ARCHIVE_FORMAT = 3
"""Of ``model-config.yaml``. Archives are not read across formats: a bundle is packed again in seconds. 1: the handler's
table named a runtime and a precision in place of a variant. 2: no list of the digests of all files."""

DRAIN_VARIABLE = "IVDR_DRAIN_FILE"
"""Environment variable of a worker: when the file of that name is there, it takes no more requests."""

_JAVA_INT = (1 << 31) - 1
"""Largest number that TorchServe reads."""

_ANSWER_SECONDS = 30.0
"""Time granted to everything that is neither decoding nor the network: transfers, JSON, a decode worker that starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSettings:
    """What TorchServe does with the workers; the file given to ``ivdr archive --config`` has these keys."""

    service: ServiceSettings = field(default_factory=ServiceSettings)
    """What each worker does."""

    workers: int = 1
    """Worker processes; each loads the model (about 0.5 GB of its own) and answers one batch at a time."""

    batch_size: int = 4
    """Most requests answered together."""

    max_batch_delay_ms: int = 1
    """How long the first request of a batch waits for others; a lone request pays it in full. At least 1: TorchServe
    takes 0 for its own default, which is 100. What waits in the queue is taken without it; many clients that come at
    the same moment make fuller batches with 10."""

    queue_size: int = 32
    """Requests that may wait; one more is answered 503 at once. Waiting videos are held in memory."""

    startup_seconds: int = 300
    """Time a worker may take to load the model and replay the golden clips."""

    max_seconds_per_clip: float = 1.0
    """Time that the network may take for one clip. TorchServe kills a worker whose batch takes longer than that."""

    def __post_init__(self) -> None:
        for name in ("workers", "batch_size", "max_batch_delay_ms", "queue_size", "startup_seconds"):
            if not 1 <= getattr(self, name) <= _JAVA_INT:
                raise ConfigError(f"{name} must be at least 1, found {quoted(getattr(self, name))}")
        if not 0 < self.max_seconds_per_clip < math.inf:
            raise ConfigError(f"max_seconds_per_clip must be positive, found {self.max_seconds_per_clip}")
        if not self.service.limits.max_decode_seconds < math.inf or self.response_timeout_seconds > _JAVA_INT:
            raise ConfigError(
                "a batch may take longer than TorchServe can wait",
                hint="lower max_decode_seconds, max_seconds_per_clip, max_clips or batch_size",
            )
        if self.service.max_request_bytes >= 1 << 31:
            raise ConfigError(
                f"max_bytes {self.service.limits.max_bytes} is more than TorchServe takes in one request",
                hint="1500000000 is possible; score larger videos with `ivdr score`",
            )

    @property
    def response_timeout_seconds(self) -> int:
        """TorchServe's limit for one batch, longer than any batch that is allowed can take.

        Every request may decode until its worker is killed, and every clip may go through the network twice: a joint
        call that fails is run again request by request. Fetching by URL and timelines have times of their own.
        """
        rounds = math.ceil(self.batch_size / self.service.decode_workers)
        decode = rounds * (self.service.limits.max_decode_seconds + GRACE_SECONDS)
        clips = self.batch_size * self.service.max_clips + self.service.max_timelines * MOST_WAITING
        infer = 2 * clips * self.max_seconds_per_clip
        return math.ceil(decode + infer + self.service.slow_seconds + _ANSWER_SECONDS)


def to_model_config(settings: EndpointSettings) -> str:
    """Write ``model-config.yaml``: TorchServe's own keys, and ours under ``service`` and ``server``."""
    values = {
        "minWorkers": settings.workers,
        "maxWorkers": settings.workers,
        "batchSize": settings.batch_size,
        "maxBatchDelay": settings.max_batch_delay_ms,
        "responseTimeout": settings.response_timeout_seconds,
        "startupTimeout": settings.startup_seconds,
        "deviceType": "gpu" if settings.service.device == "cuda" else "cpu",
        "ivdr_format": ARCHIVE_FORMAT,
        "service": to_dict(settings.service),
        "server": {
            "queue_size": settings.queue_size,
            "max_seconds_per_clip": settings.max_seconds_per_clip,
        },
    }
    yaml = require("yaml", extra="torchserve")
    return str(yaml.safe_dump(values, sort_keys=False))


def from_model_config(text: str | bytes, *, where: str) -> EndpointSettings:
    """Read back what ``to_model_config`` wrote.

    Raises:
        ArtifactError: if it is something else, or was written by another version.
    """
    yaml = require("yaml", extra="torchserve")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{where} is not YAML ({reason_of(error, whole=True)})", hint=PACK_AGAIN
        ) from error
    service = service_settings(values, where=where)
    try:
        taken: Mapping[str, Any] = {
            "workers": values["minWorkers"],
            "batch_size": values["batchSize"],
            "max_batch_delay_ms": values["maxBatchDelay"],
            "startup_seconds": values["startupTimeout"],
            **values["server"],
            "service": service,
        }
        return from_dict(EndpointSettings, taken, where=where)
    except (TypeError, KeyError) as error:
        raise ArtifactError(
            f"{where} was not written by `ivdr archive`: no {error}", hint=PACK_AGAIN
        ) from error
    except ConfigError as error:
        raise ArtifactError(error.message, hint=PACK_AGAIN) from error


def service_settings(values: Any, *, where: str) -> ServiceSettings:
    """Take the settings of a worker from a ``model-config.yaml`` that has been parsed.

    Raises:
        ArtifactError: if it was written by something else, or by another version.
    """
    if not isinstance(values, Mapping) or not ("ivdr_format" in values or "handler" in values):
        raise ArtifactError(f"{where} was not written by `ivdr archive`", hint=PACK_AGAIN)
    found = values.get("ivdr_format", 1)
    if found != ARCHIVE_FORMAT:
        raise ArtifactError(
            f"{where}: the archive has format {str(found)[:20]}, this version of ivdr_deploy reads format "
            f"{ARCHIVE_FORMAT}",
            hint=f"pack again: {PACK_AGAIN}",
        )
    try:
        return from_dict(ServiceSettings, values.get("service", {}), where=f"{where}: service")
    except ConfigError as error:
        raise ArtifactError(error.message, hint=error.hint or PACK_AGAIN) from error
