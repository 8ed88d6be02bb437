"""Events made of the scores of windows: when something begins, when it ends, and how sure the network was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ivdr_deploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelinePlan:
    """How a long video is looked through, and what counts as an event."""

    hop: int = 0
    """Frames of the sampling grid from window to window; 0 takes half a window. At most a whole window: nothing is
    passed over."""

    enter: float = 0.5
    """Probability at which an event of a label begins. From one half on only one label can be entered at a time."""

    leave: float = 0.3
    """Probability below which it ends: lower than ``enter``, so that one that wavers does not fall to pieces."""

    min_seconds: float = 0.5
    """An event that lasts less is none."""

    def __post_init__(self) -> None:
        if self.hop < 0:
            raise ConfigError(f"hop must not be negative, found {str(self.hop)[:20]}")
        if not 0 < self.leave <= self.enter <= 1:
            raise ConfigError(
                f"enter is {str(self.enter)[:20]} and leave {str(self.leave)[:20]}",
                hint="both are probabilities above 0, and leave is at most enter",
            )
        if not 0 <= self.min_seconds < float("inf"):
            raise ConfigError(f"min_seconds must not be negative, found {str(self.min_seconds)[:20]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that goes on for a while. Events of different labels may overlap."""

    label: str
    start_seconds: float
    end_seconds: float
    score: float
    """Mean probability of the label over the windows of the event."""


@dataclass(slots=True)
class _Open:
    start_seconds: float
    end_seconds: float
    total: float
    windows: int


class EventFinder:
    """Finds events in the windows of one video as they come.

    Hysteresis, for each label by itself: an event begins with the window whose probability reaches ``plan.enter`` and
    ends before the first one below ``plan.leave``. Where windows overlap, each stands for the part of the video that is
    nearest to its middle, so that an event is as long as what was seen and not a window longer.

    Args:
        labels: Class names in the order of the probabilities.
        plan: The thresholds.
    """

    def __init__(self, labels: Sequence[str], plan: TimelinePlan) -> None:
        self._labels, self._plan = labels, plan
        self._open: dict[int, _Open] = {}

    def add(self, part: tuple[float, float], probabilities: np.ndarray) -> list[Event]:
        """Take the next window.

        Args:
            part: Seconds, the part of the video that it stands for; it begins where the last one ended.
            probabilities: (K,) of each label.

        Returns:
            The events that have ended with the window before, in the order of their beginnings.
        """
        ended = [index for index in self._open if probabilities[index] < self._plan.leave]
        events = self._close(ended)
        for entered in np.flatnonzero(probabilities >= self._plan.enter):
            self._open.setdefault(int(entered), _Open(part[0], part[0], 0.0, 0))
        for index, event in self._open.items():
            event.end_seconds = part[1]
            event.total += float(probabilities[index])
            event.windows += 1
        return events

    def finish(self) -> list[Event]:
        """Return the events that go on until the end of the video."""
        return self._close(list(self._open))

    def _close(self, indices: list[int]) -> list[Event]:
        ended = [(index, self._open.pop(index)) for index in indices]
        return [
            Event(
                label=self._labels[index],
                start_seconds=event.start_seconds,
                end_seconds=event.end_seconds,
                score=event.total / event.windows,
            )
            for index, event in ended
            if event.end_seconds - event.start_seconds >= self._plan.min_seconds
        ]
