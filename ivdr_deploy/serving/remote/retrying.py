"""When a request is sent again: which failures pass, how long to wait, and when to give up. No network in it."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from ivdr_deploy.errors import ConfigError

_PASSING = frozenset({429, 503})
"""Statuses that say: not now."""

_WORKER_DIED = "worker died"
"""In TorchServe's answer, 500 or 507, to the requests that a worker had when it was ended: no fault of theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often and how long a request is tried."""

    deadline_seconds: float = 120.0
    """For everything together: sending, waiting, sending again. Then the last failure is raised."""

    first_seconds: float = 0.2
    """Longest wait before the second try; it doubles with each further one."""

    most_seconds: float = 10.0
    """Longest wait of one's own. A server that says how long to wait is obeyed."""

    attempts: int = 20
    """Most tries; 1 sends nothing again."""

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "first_seconds", "most_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, found {str(getattr(self, name))[:20]}")
        if self.attempts < 1:
            raise ConfigError(f"attempts must be at least 1, found {str(self.attempts)[:20]}")


class Schedule:
    """The tries of one request.

    Args:
        retry: How often and how long.
        clock: Seconds, never falling.
        chance: Draws from 0 to 1. Clients that were refused together must not come back together.
    """

    def __init__(
        self,
        retry: Retry,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._retry, self._clock, self._chance = retry, clock, chance
        self._end = clock() + retry.deadline_seconds
        self._tries = 0

    def remaining(self) -> float:
        """Begin a try; return the seconds that are left for it."""
        self._tries += 1
        return max(0.0, self._end - self._clock())

    def wait_seconds(self, *, asked: float = 0.0) -> float | None:
        """Return how long to wait before the next try; None when it is time to give up.

        Args:
            asked: What the server asks for at least.
        """
        if self._tries >= self._retry.attempts:
            return None
        longest = min(self._retry.most_seconds, self._retry.first_seconds * 2.0 ** min(self._tries - 1, 60))
        wait = asked + longest * self._chance()
        return wait if self._clock() + wait < self._end else None


def passes(status: int, text: str) -> bool:
    """Say whether a failure may be gone the next time.

    Args:
        status: Of HTTP.
        text: The body, or its beginning.
    """
    return status in _PASSING or (status in (500, 507) and _WORKER_DIED in text.lower())


def retry_after(value: str | None, *, now: float | None = None) -> float:
    """Return the seconds of a ``Retry-After`` header, which may be a number or a date; 0 where it says nothing usable.

    Args:
        value: The header.
        now: Seconds since 1970; the present when None.
    """
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value.strip()[:10])
    try:
        at = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):  # OverflowError: a year that the system's clock does not know
        return 0.0
    return max(0.0, at - (time.time() if now is None else now))
