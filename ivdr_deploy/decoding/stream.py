"""A long video that comes out of a decode worker piece by piece."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from ivdr_deploy.decoding.pool import DecodeOptions, DecodePool
from ivdr_deploy.errors import VideoCrashError
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.source import PathSource, Source

T = TypeVar("T")

_numbers = itertools.count()

_open: dict[int, Iterator[Any]] = {}
"""In a worker: what it is in the middle of. With threads, that of all streams of this process."""


class DecodeStream(Generic[T]):
    """The pieces of one video, each made by a job of its own in one worker that keeps the video open in between.

    So a piece has the deadline, the limit of memory and the failure policy of every other job of a ``DecodePool``, and
    whoever stops asking stops the decoding. One piece is made ahead. An iterator and a context manager: ``close`` ends
    the worker, whatever it is doing.

    Args:
        pieces: Called as ``pieces(source, limits=limits, **kwargs)`` in the worker; a function of a module.
        source: The video.
        limits: What it may cost; ``max_decode_seconds`` also gives the deadline of each piece.
        options: What the worker is; how many there are does not count.
        kwargs: More arguments of ``pieces``.
    """

    def __init__(
        self,
        pieces: Callable[..., Iterator[T]],
        source: Source,
        *,
        limits: VideoLimits,
        options: DecodeOptions,
        **kwargs: Any,
    ) -> None:
        self._number = next(_numbers)
        self._limits = limits
        self._pool = DecodePool(replace(options, workers=1))
        # The video travels once; bytes would be written to a file for every piece.
        self._rest = PathSource(Path(os.devnull), uri=source.uri)
        self._next: Future[T | None] | None = self._pool.submit(
            _begin, source, self._number, pieces, kwargs, limits=limits
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        """Return the next piece.

        Raises:
            VideoError: if the video cannot be used any further; also as ``DecodePool``.
        """
        if self._next is None:
            raise StopIteration
        piece = self._next.result()
        if piece is None:
            self._next = None
            raise StopIteration
        self._next = self._pool.submit(_go_on, self._rest, self._number, limits=self._limits)
        return piece

    def close(self) -> None:
        """End the worker; calling it twice is allowed."""
        self._pool.close()
        _open.pop(self._number, None)  # with threads it is here

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _begin(
    source: Source,
    number: int,
    pieces: Callable[..., Iterator[T]],
    kwargs: dict[str, Any],
    *,
    limits: VideoLimits,
) -> T | None:
    """Open a video and make its first piece; runs in the worker."""
    _open[number] = pieces(source, limits=limits, **kwargs)
    piece: T | None = _go_on(source, number, limits=limits)
    return piece


def _go_on(source: Source, number: int, *, limits: VideoLimits) -> Any:
    """Make the next piece of what was begun, None after the last; runs in the worker."""
    if number not in _open:  # the pool gives a job to a new worker when an idle one was killed
        raise VideoCrashError(
            f"{source.uri}: the process that decoded it was ended in between",
            hint="the machine's memory, or somebody ended it; send it again",
        )
    return next(_open[number], None)
