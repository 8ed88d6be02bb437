"""The clip batcher: between decoding and a runtime, it takes what is ready whenever the runtime is free."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import ClosedError, InferenceError, IvdrError, ResourceError
from ivdr_deploy.spec import MAX_BATCH

Infer = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""``Runtime.infer``: uint8 (N, T, H, W, 3) -> one array per output, first axis N."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inferred:
    """What the network gave for the clips of one video."""

    outputs: dict[str, np.ndarray]
    """One array per output, first axis the clips of the video."""

    infer_ms: float
    """Time of the network for this video's share of the calls it was in."""

    batch_clips: int
    """Clips that were waiting together with these, its own included."""


@dataclass(slots=True)
class _Video:
    clips: np.ndarray
    result: Future[Inferred]


@dataclass(slots=True)
class _Waiting:
    videos: list[_Video]
    may_grow: bool
    """Whether others that wait may share its call."""

    @property
    def clips(self) -> int:
        return sum(len(video.clips) for video in self.videos)


class ClipBatcher:
    """Puts the clips of many videos through a network, in one thread of its own.

    There is no timer: a lone video waits for nobody, and while the network is busy others gather. Calls hold at most
    ``max_clips`` clips; a video with more is cut. When a call fails, or cannot be put together, the videos in it are
    run one by one, so that only those at fault fail.
    """

    def __init__(self, infer: Infer, *, max_clips: int = MAX_BATCH) -> None:
        self._infer = infer
        self._max_clips = max_clips
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._engine = threading.Lock()
        """Held while the network runs: it takes one call at a time."""

    def submit(self, video: np.ndarray) -> Future[Inferred]:
        """Let the clips of one video take their turn, together with whatever else waits then.

        Args:
            video: uint8 (N, T, H, W, 3), N >= 1.

        Returns:
            What the network gave, or an ``InferenceError``, or the error of ours that the runtime raised.

        Raises:
            ClosedError: if the batcher was closed.
            ResourceError: if its thread cannot be started.
        """
        return self._submit([video], may_grow=True)[0]

    def submit_next(self, video: np.ndarray) -> Future[Inferred]:
        """Let the clips of one video be the next call, by themselves, ahead of what waits; else as ``submit``."""
        return self._submit([video], may_grow=False, first=True)[0]

    def submit_together(self, videos: Sequence[np.ndarray]) -> list[Future[Inferred]]:
        """Let the clips of some videos be one call, and of no others.

        The last digits of a result depend on what else is in a call. A run that must give the same table however often
        it is interrupted decides itself what goes together, and does not leave it to chance.

        Args:
            videos: uint8 (N, T, H, W, 3) each.

        Returns:
            For each video the same as ``submit``.

        Raises:
            ClosedError: if the batcher was closed.
            ResourceError: if its thread cannot be started.
        """
        return self._submit(videos, may_grow=False)

    def _submit(
        self, videos: Sequence[np.ndarray], *, may_grow: bool, first: bool = False
    ) -> list[Future[Inferred]]:
        waiting = _Waiting([_Video(clips, Future()) for clips in videos], may_grow)
        for video in waiting.videos:
            video.result.set_running_or_notify_cancel()
        with self._changed:
            if self._closed:
                raise ClosedError("this clip batcher was closed")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="infer", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise ResourceError(
                        f"the thread of the network cannot be started ({error})",
                        hint="raise the limit of memory or threads of this process (`ulimit -v`, `ulimit -u`)",
                    ) from error
                self._thread = thread
            if first:
                self._waiting.appendleft(waiting)
            else:
                self._waiting.append(waiting)
            self._changed.notify()
        return [video.result for video in waiting.videos]

    def run(self, video: np.ndarray) -> Inferred:
        """Run the clips of one video and wait: in this thread where nothing else waits, which saves two changes of it.

        Raises:
            InferenceError: as ``submit``; an error of ours that the runtime raised stays what it is.
            ClosedError: if the batcher was closed.
        """
        if self._waiting or not self._engine.acquire(blocking=False):
            return self.submit(video).result()
        try:
            if self._closed:
                raise ClosedError("this clip batcher was closed")
            alone = _Video(video, Future())
            self._answer([alone])
            return alone.result.result()
        finally:
            self._engine.release()

    def close(self) -> None:
        """Finish what was submitted and stop; calling it twice is allowed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                taken = self._take()
            with self._engine:
                self._answer(taken)

    def _take(self) -> list[_Video]:
        """Take as many videos as fit into a call, at least one."""
        first = self._waiting.popleft()
        taken, clips = first.videos, first.clips
        while first.may_grow and self._waiting and self._waiting[0].may_grow:
            if clips + self._waiting[0].clips > self._max_clips:
                break
            clips += self._waiting[0].clips
            taken = [*taken, *self._waiting.popleft().videos]
        return taken

    def _answer(self, taken: list[_Video]) -> None:
        try:
            # All of it: what is raised past here would end the thread, and whoever waits would wait for ever.
            given = self._inferred([video.clips for video in taken])
        except Exception as error:  # noqa: BLE001  # whatever a runtime raises belongs to whoever waits
            if len(taken) == 1:
                taken[0].result.set_exception(_as_ours(error))
                return
            _log.warning(
                "a call with %d videos failed (%s); each is run alone", len(taken), reason_of(error, most=200)
            )
            for item in taken:
                self._answer([item])
            return
        for item, inferred in zip(taken, given, strict=True):
            item.result.set_result(inferred)

    def _inferred(self, videos: list[np.ndarray]) -> list[Inferred]:
        """Put the clips of some videos together, run them, and take apart what comes out."""
        together = videos[0] if len(videos) == 1 else np.concatenate(videos)
        start = time.perf_counter()
        outputs = self._call(together)
        share_ms = (time.perf_counter() - start) * 1000.0 / len(together)
        given, end = [], 0
        for clips in videos:
            rows = slice(end, end := end + len(clips))
            given.append(
                Inferred(
                    outputs={name: value[rows] for name, value in outputs.items()},
                    infer_ms=share_ms * len(clips),
                    batch_clips=len(together),
                )
            )
        return given

    def _call(self, video: np.ndarray) -> Mapping[str, np.ndarray]:
        size = self._max_clips
        parts = [self._infer(video[start : start + size]) for start in range(0, len(video), size)]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _as_ours(error: Exception) -> IvdrError:
    """Return an error of ours as it is, and any other as a failure of the network."""
    if isinstance(error, IvdrError):
        return error
    _log.error("the network failed", exc_info=error)
    return InferenceError(
        f"the network failed on this video ({type(error).__name__}: {reason_of(error, most=200)})"
    )
