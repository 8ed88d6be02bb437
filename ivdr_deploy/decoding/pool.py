"""Decode workers: threads of this process, or processes that can be killed.

The failure policy, the same for every reader of videos: what goes wrong with one video is a ``VideoError`` of that
video and of nothing else. That holds for a worker that dies (``crashed``), one that passes its deadline (``too_slow``),
one that runs out of memory (``too_large``), and for an exception that nobody foresaw (``crashed``, with a traceback in
the log). Errors that would hit every video, such as a package that is missing, stay what they are.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ivdr_deploy._text import one_line, reason_of
from ivdr_deploy.decoding import _forkserver, _worker
from ivdr_deploy.decoding._process import WorkerProcess
from ivdr_deploy.errors import (
    ConfigError,
    IvdrError,
    ResourceError,
    VideoCrashError,
    VideoError,
    VideoLimitError,
)
from ivdr_deploy.spec import Isolation
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.source import Source

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

GRACE_SECONDS = 5.0
"""Wall time that a worker process has on top of ``max_decode_seconds`` before it is killed. The limit itself is looked
at between frames, and its message says more: the deadline is for a frame that hangs."""

_log = logging.getLogger(__name__)


class DecodeJob(Protocol[T_co]):
    """What a worker does with a source: a function of a module, for example ``video.clips.load_clips``."""

    def __call__(self, source: Source, /, *args: Any, **kwargs: Any) -> T_co:
        """Do it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """How videos are decoded."""

    workers: int = 1
    """Videos that are decoded at the same time."""

    isolation: Isolation = "process"
    """``process``: each worker can be killed, and dies without taking anything along. ``thread``: inside this process,
    where a crash of the decoder ends everything and a frame that hangs is waited for."""

    memory_bytes: int = 1 << 30
    """Memory that one worker process may take beyond what it needs before the first video. Videos of 4096x2304 pixels
    took 30 to 270 MB in eight codecs, and 781 MB as 4:4:4 H.264 of 10 bits with 16 reference frames."""

    def __post_init__(self) -> None:
        for name in ("workers", "memory_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")


class DecodePool:
    """Runs decode jobs in the background. Safe to use from many threads; a context manager.

    Workers start at the first job. Processes are forked from a small server process that has the decoder
    loaded, so that replacing a dead one takes milliseconds.
    """

    def __init__(self, options: DecodeOptions | None = None) -> None:
        self.options = options or DecodeOptions()
        self._lock = threading.Lock()
        self._crew: _Crew | None = None

    def submit(
        self, job: DecodeJob[T], source: Source, *args: Any, limits: VideoLimits, **kwargs: Any
    ) -> Future[T]:
        """Do a job on a video in the background.

        Args:
            job: Called as ``job(source, *args, limits=limits, **kwargs)`` in a worker.
            source: The video.
            args: More arguments of the job.
            limits: What the video may cost; ``max_decode_seconds`` also gives the deadline of a worker process.
            kwargs: More arguments of the job.

        Returns:
            What the job gives, or a ``VideoError``, or an error that would hit every video.

        Raises:
            ResourceError: if this process may start no more threads.
        """
        kwargs["limits"] = limits
        try:
            with self._lock:
                if self._crew is None:
                    self._crew = (_Crew if self.options.isolation == "thread" else _ProcessCrew)(self.options)
                return self._crew.submit(job, source, args, kwargs)
        except RuntimeError as error:
            raise ResourceError(
                f"the decode workers cannot be started ({reason_of(error)})",
                hint="raise the limit of memory or threads of this process (`ulimit -v`, `ulimit -u`)",
            ) from error

    def each(
        self, job: DecodeJob[T], calls: Iterable[tuple[Source, *tuple[Any, ...]]], *, limits: VideoLimits
    ) -> Iterator[T | VideoError]:
        """Do a job on many videos, in order; a few are done ahead, so that a long list needs no more memory.

        Args:
            job: As for ``submit``.
            calls: The source of each, and more arguments of the job; taken when its turn comes.
            limits: What a video may cost.

        Yields:
            What the job gives for each video, or why it cannot be used.
        """
        waiting: deque[Future[T]] = deque()

        def next_one() -> T | VideoError:
            try:
                return waiting.popleft().result()
            except VideoError as error:
                return error

        for source, *args in calls:
            waiting.append(self.submit(job, source, *args, limits=limits))
            if len(waiting) > 2 * self.options.workers:
                yield next_one()
        while waiting:
            yield next_one()

    def close(self) -> None:
        """Stop the workers; jobs that have not begun are dropped. Calling it twice is allowed."""
        with self._lock:
            crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Crew:
    """Threads that take jobs, and do them themselves."""

    def __init__(self, options: DecodeOptions) -> None:
        self._options, self._closed = options, False
        self._threads = ThreadPoolExecutor(
            options.workers, thread_name_prefix="decode", initializer=self._prepare
        )

    def submit(
        self, job: DecodeJob[T], source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[T]:
        """Do a job as soon as one of the threads is free."""
        return self._threads.submit(self._settled, job, source, args, kwargs)

    def close(self) -> None:
        """End them when what has begun is done."""
        self._closed = True
        self._threads.shutdown(wait=True)

    def _prepare(self) -> None:
        """Begin, in a thread."""
        _worker.give_way()

    def _do(self, job: DecodeJob[T], source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        return job(source, *args, **kwargs)

    def _settled(self, job: DecodeJob[T], source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """Do a job under the failure policy; runs in a thread."""
        if self._closed:  # an error as any other to who waits, which a future that was cancelled is not
            raise CancelledError
        try:
            return self._do(job, source, args, kwargs)
        except Exception as error:
            meant = _as_video_error(error, source.uri, self._options)
            if meant is error:
                raise
            raise meant from error


class _ProcessCrew(_Crew):
    """Threads that take jobs, and have a process each that does them."""

    def __init__(self, options: DecodeOptions) -> None:
        super().__init__(options)
        self._scratch = _worker.Scratch()
        self._context = _forkserver.context()
        try:
            self._closing, self._open = os.pipe()
        except OSError:
            self._scratch.remove()
            raise
        self._own = threading.local()
        self._workers: list[WorkerProcess] = []
        self._numbers = itertools.count()
        met = threading.Barrier(options.workers)
        try:
            for _ in range(options.workers):
                self._threads.submit(self._begin, met)
        except RuntimeError:
            met.abort()
            self.close()
            raise

    def close(self) -> None:
        """End them at once."""
        self._closed = True  # before what has begun ends, and the next job is taken
        os.close(self._open)
        super().close()
        for worker in self._workers:
            worker.end()
        os.close(self._closing)
        self._scratch.remove()

    def _prepare(self) -> None:
        path, memory_bytes = self._scratch.file(next(self._numbers)), self._options.memory_bytes
        self._own.worker = WorkerProcess(self._context, path, memory_bytes, self._closing)
        self._workers.append(self._own.worker)

    def _begin(self, met: threading.Barrier) -> None:
        """Start the process of one of the threads, before it takes jobs.

        Args:
            met: When all threads have come there, each has taken one of these.
        """
        met.wait()
        self._own.worker.start()

    def _do(self, job: DecodeJob[T], source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        seconds = kwargs["limits"].max_decode_seconds + GRACE_SECONDS
        worker: WorkerProcess = self._own.worker
        done: T = worker.do(job, source, args, kwargs, seconds=seconds)
        return done


def _as_video_error(error: Exception, name: str, options: DecodeOptions) -> Exception:
    """Return what an exception of a job means; see the failure policy at the top."""
    if isinstance(error, CancelledError | IvdrError | _worker.ScratchError):
        return error  # a full disk would hit every video
    if isinstance(error, MemoryError):
        allowed = (
            f"the {options.memory_bytes >> 20} MiB allowed" if options.isolation == "process" else "there is"
        )
        return VideoLimitError(
            f"{name} needs more memory than {allowed}", hint="send a smaller video, or raise the limit"
        )
    _log.error("decoding %s failed unexpectedly", one_line(name), exc_info=error)
    return VideoCrashError(
        f"{name}: unexpected {type(error).__name__} while decoding ({reason_of(error, most=100)})",
        hint="please report this with the file",
    )
