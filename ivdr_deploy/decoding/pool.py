"""Decode workers: threads of this process, or processes that can be killed.

The failure policy, the same for every reader of videos: what goes wrong with one video is a ``VideoError`` of that
video and of nothing else. That holds for a worker that dies (``crashed``), one that passes its deadline (``too_slow``),
one that runs out of memory (``too_large``), and for an exception that nobody foresaw (``crashed``, with a traceback in
the log). Errors that would hit every video, such as a package that is missing, stay what they are.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ivdr_deploy._text import one_line, reason_of
from ivdr_deploy.decoding import _worker
from ivdr_deploy.environment import ending
from ivdr_deploy.errors import (
    ConfigError,
    IvdrError,
    ResourceError,
    VideoCrashError,
    VideoError,
    VideoLimitError,
    VideoTimeoutError,
)
from ivdr_deploy.spec import Isolation
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.source import Source

if TYPE_CHECKING:
    from pebble import ProcessPool

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

GRACE_SECONDS = 5.0
"""Wall time that a worker process has on top of ``max_decode_seconds`` before it is killed. The limit itself is looked
at between frames, and its message says more: the deadline is for a frame that hangs."""

_LOOK_SECONDS = 0.2
"""How often it is looked whether the workers' pool still works, while there is one."""

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

    Workers start at the first job. With processes they are forked from a small server process that has the decoder
    loaded, so that replacing a dead one takes milliseconds.
    """

    def __init__(self, options: DecodeOptions | None = None) -> None:
        self.options = options or DecodeOptions()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._processes: ProcessPool | None = None
        self._scratch: _worker.Scratch | None = None
        self._sent: dict[Future[Any], tuple[ProcessPool, _Task[Any], _worker.Parcel]] = {}
        """What processes have been asked for and nobody has dealt with yet."""
        self._closing = threading.Event()
        self._watching: threading.Thread | None = None

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
        """
        kwargs["limits"] = limits
        if self.options.isolation == "thread":
            with self._lock:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(
                        self.options.workers, thread_name_prefix="decode", initializer=_worker.give_way
                    )
                return self._threads.submit(_settled, job, source, args, kwargs)
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()
        self._send(
            _Task(job, source, args, kwargs, result, deadline=limits.max_decode_seconds + GRACE_SECONDS)
        )
        return result

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
            threads, watch, scratch = self._threads, self._watching, self._scratch
            self._threads = self._processes = self._watching = self._scratch = None
            self._closing.set()
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        if watch is not None:
            watch.join()
        if scratch is not None:
            scratch.remove()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, task: _Task[T]) -> None:
        with self._lock:
            if self._scratch is None:
                self._scratch = _worker.Scratch()
            scratch = self._scratch
            parcel = scratch.pack(task.source)
            arguments = (task.job, parcel, task.args, task.kwargs)
            while True:
                processes = self._working_processes()
                try:
                    sent = processes.schedule(_worker.run, args=arguments, timeout=task.deadline)
                    break
                except RuntimeError:  # it broke between the two lines
                    if processes.active:
                        raise
            self._sent[sent] = (processes, task, parcel)
        sent.add_done_callback(lambda done: self._received(done, scratch))

    def _working_processes(self) -> ProcessPool:
        """Return the pool of processes, a new one when the last is broken. The lock is held."""
        if self._processes is None or not self._processes.active:
            processes, closing = _start_processes(self.options), threading.Event()
            watch = threading.Thread(
                target=self._watch, args=(processes, closing), name="decode-watch", daemon=True
            )
            try:
                _ = processes.active  # starts it: before the watch, which would start it a second time
                watch.start()
            except RuntimeError as error:
                processes.stop()  # type: ignore[no-untyped-call]
                processes.join()
                raise ResourceError(
                    f"the decode workers cannot be started ({reason_of(error)})",
                    hint="raise the limit of memory or threads of this process (`ulimit -v`, `ulimit -u`)",
                ) from error
            self._processes, self._closing, self._watching = processes, closing, watch
        return self._processes

    def _watch(self, processes: ProcessPool, closing: threading.Event) -> None:
        """End a pool of processes when it breaks or is closed; do again what it was asked for and has lost.

        Only here: two threads that end it fall over each other.
        It breaks when an idle worker is killed. Tasks that it knows then are given back as failed; one that is on its
        way into it just then is never heard of again.
        """
        while processes.active and not closing.wait(_LOOK_SECONDS):
            pass
        processes.stop()  # type: ignore[no-untyped-call]
        processes.join()  # no worker is left that could still write a result
        with self._lock:
            lost = [sent for sent, (owner, _, _) in self._sent.items() if owner is processes]
            found = [self._sent.pop(sent) for sent in lost]
            scratch = None if closing.is_set() else self._scratch
            if scratch is not None:
                for _, _, parcel in found:
                    scratch.release(parcel)
        for _, task, _ in found:
            try:
                if scratch is None:
                    raise CancelledError
                if task.sent_again:
                    raise ResourceError(
                        f"the decode workers were killed twice while {task.source.uri} waited for one",
                        hint="the machine's memory, or somebody ended them",
                    )
                task.sent_again = True
                self._send(task)
            except Exception as error:  # noqa: BLE001  # whoever waits for the task gets it
                task.result.set_exception(error)

    def _received(self, done: Future[Any], scratch: _worker.Scratch) -> None:
        """Turn what came back from a process into the result of the task; runs in a thread of the pool."""
        if not done.cancelled() and isinstance(done.exception(), BrokenProcessPool):
            return  # nothing of this task has run: see `_watch`
        with self._lock:
            if done not in self._sent:
                return  # `_watch` has taken it over
            _, task, parcel = self._sent.pop(done)
        try:
            result = scratch.unpack(parcel, done.result())
            scratch.release(parcel)
            task.result.set_result(result)
        except (Exception, CancelledError) as error:  # noqa: BLE001  # sorted by the failure policy
            scratch.release(parcel)
            task.result.set_exception(_as_video_error(error, task.source.uri, self.options, task.deadline))


@dataclass(slots=True)
class _Task(Generic[T]):
    job: DecodeJob[T]
    source: Source
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Future[T]
    deadline: float
    sent_again: bool = False


def _settled(job: DecodeJob[T], source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Run a job in this thread under the failure policy."""
    try:
        return job(source, *args, **kwargs)
    except Exception as error:
        raise _as_video_error(error, source.uri, None, 0.0) from error


def _as_video_error(
    error: BaseException, name: str, options: DecodeOptions | None, deadline: float
) -> BaseException:
    """Return what an exception in a worker means; see the failure policy at the top."""
    from pebble import ProcessExpired

    if isinstance(error, CancelledError | IvdrError):
        return error
    if isinstance(error, ProcessExpired):
        return VideoCrashError(
            f"{name}: the process that decoded it {ending(error.exitcode)}",
            hint="the file, or the machine's memory; the other videos are not affected",
        )
    if isinstance(error, TimeoutError) and options is not None:
        return VideoTimeoutError(
            f"{name}: decoding did not end within {deadline:g} s, and its process was killed",
            hint="the file is damaged, or the machine is overloaded; raise max_decode_seconds if it is large",
        )
    if isinstance(error, MemoryError):
        allowed = (
            f" than the {options.memory_bytes >> 20} MiB allowed" if options is not None else " than there is"
        )
        return VideoLimitError(
            f"{name} needs more memory{allowed}", hint="send a smaller video, or raise the limit"
        )
    if isinstance(error, _worker.ScratchError):
        return error  # the disk or the shared memory is full: it would hit every video
    _log.error("decoding %s failed unexpectedly", one_line(name), exc_info=error)
    return VideoCrashError(
        f"{name}: unexpected {type(error).__name__} while decoding ({reason_of(error, most=100)})",
        hint="please report this with the file",
    )


def _start_processes(options: DecodeOptions) -> ProcessPool:
    from pebble import ProcessPool

    from ivdr_deploy.decoding._forkserver import context

    return ProcessPool(
        max_workers=options.workers,
        initializer=_worker.initialise,
        initargs=(options.memory_bytes,),
        context=context(),
    )
