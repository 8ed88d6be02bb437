"""What the HTTP server does with a service, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ivdr_deploy.decoding.pool import GRACE_SECONDS
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.serving.core.settings import ServiceSettings, check_seconds
from ivdr_deploy.timeline import MOST_WAITING

MAX_SECONDS_PER_CLIP = 1.0
"""Of the network; what stopping waits for, and when it counts as stuck, is reckoned with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSettings:
    """What the server does; the file given to ``ivdr serve --config`` has these keys."""

    service: ServiceSettings = field(default_factory=ServiceSettings)
    """What answers the requests."""

    max_requests: int = 32
    """Requests that are taken at the same time, those that wait and those that run; one more is answered 429 at once.
    Their videos are held in memory."""

    workers: int = 1
    """Processes that hold HTTP and the network, each its own; they share the port. With two, one that dies or is
    replaced leaves the other to answer. ``max_requests`` is for each."""

    startup_seconds: float = 300.0
    """Time that a worker may take to load the model and replay golden clips and videos."""

    receive_seconds: float = 60.0
    """Time that a client may take to send a request."""

    canary_seconds: float = 10.0
    """How often the network is asked for a golden clip, which it must give right for ``/ready`` to say so."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {str(getattr(self, name))[:20]}")
        for name in ("startup_seconds", "receive_seconds", "canary_seconds"):
            check_seconds(name, getattr(self, name))
        check_seconds("service.limits.max_decode_seconds", self.service.limits.max_decode_seconds)

    @property
    def stop_seconds(self) -> int:
        """Longest time that requests which were taken may need, and stopping waits."""
        service = self.service
        decode = math.ceil(self.max_requests / service.decode_workers) * (
            service.limits.max_decode_seconds + GRACE_SECONDS
        )
        clips = self.max_requests * service.max_clips + service.max_timelines * MOST_WAITING
        infer = 2 * clips * MAX_SECONDS_PER_CLIP
        return math.ceil(self.receive_seconds + decode + infer + service.slow_seconds)
