"""How many videos are taken at a time, over every protocol together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ivdr_deploy.errors import QueueFullError, VideoLimitError


class Admission:
    """Counts the videos that are being answered. Safe to use from many threads.

    Args:
        most: That are taken at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._lock = threading.Lock()

    @contextmanager
    def taking(self, count: int = 1) -> Iterator[Callable[[int], None]]:
        """Take some videos for the length of the block, all or none.

        Yields:
            What holds another number of them from then on, for a request that has been read.

        Raises:
            VideoLimitError: if there are more than are ever taken at a time; also in the block.
            QueueFullError: if others are being answered; also in the block.
        """
        held = 0

        def hold(wanted: int) -> None:
            nonlocal held
            self._change(held, wanted)
            held = wanted

        hold(count)
        try:
            yield hold
        finally:
            hold(0)

    def _change(self, held: int, wanted: int) -> None:
        if wanted > self._most:
            raise VideoLimitError(
                f"the request has {wanted} videos, more than the {self._most} that are taken at a time",
                hint="send fewer in one request",
            )
        with self._lock:
            others = self._taken - held
            if wanted and others + wanted > self._most:
                raise QueueFullError(
                    f"{others} of {self._most} requests are being answered, there is no room for {wanted} more",
                    hint="send the request again after a while",
                )
            self._taken = others + wanted
