"""The main path, on one page: source -> decode stage -> clip batcher -> runtime -> one result per video.

``evaluate``, ``predict``, ``score``, ``verify``, ``bench`` and the endpoint all come through here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Self

import numpy as np

from ivdr_deploy.batching import ClipBatcher, Inferred
from ivdr_deploy.decoding import DecodeOptions, DecodePool, DecodeStream
from ivdr_deploy.errors import InferenceError, VideoError
from ivdr_deploy.results import Outcome, RawResult, VideoResult, combine_clips
from ivdr_deploy.runtimes.base import LoadedModel, check_batch, not_finite
from ivdr_deploy.spec import MAX_BATCH, DecoderName, ViewPlan
from ivdr_deploy.video.clips import Clips, load_clips
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.source import VideoSource, as_source
from ivdr_deploy.video.windows import Windows, read_windows

NO_HOLDS: Mapping[int, Future[None]] = MappingProxyType({})


class VideoPredictor:
    """Turns videos into results with one loaded model. A context manager; safe to use from many threads.

    Args:
        model: Open and checked; whoever opened it closes it.
        limits: What a video may cost.
        decoder: Which decoder reads videos.
        decode: How many decode workers, and what they are.
        batch_clips: Most clips in a call of the network.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        limits: VideoLimits | None = None,
        decoder: DecoderName = "pyav",
        decode: DecodeOptions | None = None,
        batch_clips: int = MAX_BATCH,
    ) -> None:
        self.model = model
        self.limits = limits or VideoLimits()
        self.decoder: DecoderName = decoder
        self._pool = DecodePool(decode)
        self._batcher = ClipBatcher(model.runtime.infer, max_clips=batch_clips)

    def close(self) -> None:
        """Stop the decode workers and the batcher; calling it twice is allowed."""
        self._pool.close()
        self._batcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def load(self, source: VideoSource, *, plan: ViewPlan | None = None) -> Clips:
        """Decode one video into the network's input, in a decode worker.

        Args:
            source: A path, the encoded bytes, or a ``Source``.
            plan: Which clips; the model's own plan when None.

        Raises:
            VideoError: if the video cannot be used.
        """
        return self._load(source, plan).result()

    def submit(self, source: VideoSource, *, plan: ViewPlan | None = None) -> Future[Outcome]:
        """Decode a video and run the network on it in the background.

        Returns:
            The outcome. An exception that would hit every video, such as a missing package, is the exception of the
            future.
        """
        return _Call(self, [source], shared=False).load(plan)[0]

    def predict(self, source: VideoSource, *, plan: ViewPlan | None = None) -> VideoResult:
        """Decode and run one video.

        Raises:
            VideoError: if the video cannot be used.
            InferenceError: if the network fails on it.
        """
        clips = self.load(source, plan=plan)
        check_batch(clips.video, self.model.clip)
        given = finite(self._batcher.run(clips.video))
        raw = RawResult(clips=clips, outputs=given.outputs, infer_ms=given.infer_ms)
        return combine_clips(raw, labels=self.model.labels)

    def windows(self, source: VideoSource, *, hop: int, most: int) -> DecodeStream[Windows]:
        """Decode a video from its beginning to its end in a worker of its own; see ``read_windows``.

        Whoever takes the windows closes the stream. A video that cannot be used is a ``VideoError`` of the next one.
        """
        return DecodeStream(
            read_windows,
            as_source(source),
            spec=self.model.clip,
            hop=hop,
            most=most,
            limits=self.limits,
            decoder=self.decoder,
            options=self._pool.options,
        )

    def infer_clips(self, clips: np.ndarray) -> Future[Inferred]:
        """Run decoded clips in the background when it is their turn; whoever waits for them calls ``finite``.

        Args:
            clips: uint8 (N, T, H, W, 3) of the model's contract.

        Raises:
            ClipShapeError: if they are not of it.
            ClosedError: if this was closed.
        """
        check_batch(clips, self.model.clip)
        return self._batcher.submit(clips)

    def infer_next(self, clips: np.ndarray) -> Future[Inferred]:
        """Run decoded clips in the background, ahead of what waits for the network; see ``ClipBatcher.submit_next``."""
        return self._batcher.submit_next(clips)

    def predict_many(
        self,
        sources: Iterable[VideoSource],
        *,
        plan: ViewPlan | None = None,
        holds: Mapping[int, Future[None]] = NO_HOLDS,
    ) -> Iterator[Outcome]:
        """Yield one outcome per source, in order, while the next videos are decoded.

        Neighbours in the list share a call of the network, as many as its runtime wants. Which ones depends on the list
        alone, so that the same list gives the same numbers to the last digit. A video that cannot be used is an outcome
        with its error; an exception that would hit every video is raised.

        Args:
            sources: Paths, encoded bytes or sources; read lazily, a few ahead.
            plan: As in ``load``.
            holds: Positions in ``sources`` at which a new call begins whatever came before. It and those after it are
                decoded, but go to the network only when the future is done.
        """
        per_call = max(1, self.model.runtime.call_clips // (plan or self.model.view_plan).max_views)
        ahead = self._pool.options.workers + 2 * per_call  # one call runs while the next one is decoded
        waiting: deque[Future[Outcome]] = deque()
        for hold, group in _neighbours(sources, per_call, holds):
            waiting += _Call(self, group, shared=True, hold=hold).load(plan)
            while len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _load(self, source: VideoSource, plan: ViewPlan | None) -> Future[Clips]:
        model = self.model
        return self._pool.submit(
            load_clips,
            as_source(source),
            model.clip,
            plan or model.view_plan,
            limits=self.limits,
            decoder=self.decoder,
        )

    def _infer(self, videos: Sequence[_Loaded], *, shared: bool) -> None:
        """Hand decoded clips to the batcher; runs in a thread of the decode pool."""
        pixels = [video.clips.video for video in videos]
        try:
            for clips in pixels:
                check_batch(clips, self.model.clip)
            if shared:
                inferring = self._batcher.submit_together(pixels)
            else:
                inferring = [self._batcher.submit(clips) for clips in pixels]
        except Exception as error:  # noqa: BLE001  # whoever waits for the videos gets it
            for video in videos:
                video.outcome.set_exception(error)
            return
        for video, given in zip(videos, inferring, strict=True):
            facts = replace(video, clips=video.clips.without_pixels())
            given.add_done_callback(partial(self._inferred, facts))

    def _inferred(self, video: _Loaded, inferred: Future[Inferred]) -> None:
        """Sum up what the network gave; runs in the thread of the batcher."""
        try:
            given = finite(inferred.result())
            raw = RawResult(clips=video.clips, outputs=given.outputs, infer_ms=given.infer_ms)
            result = combine_clips(raw, labels=self.model.labels)
            video.outcome.set_result(Outcome(video.source, result, None, raw))
        except InferenceError as error:
            video.outcome.set_result(Outcome(video.source, None, error))
        except BaseException as error:  # noqa: BLE001  # it belongs to whoever waits, not to this thread
            video.outcome.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A decoded video on its way to the network."""

    source: VideoSource
    clips: Clips
    outcome: Future[Outcome]


class _Call:
    """Videos that go to the network when the last of them is decoded.

    Args:
        predictor: Whose network.
        sources: The videos.
        shared: They are one call and no others are in it. False: each goes with whatever waits then.
        hold: What the network waits for besides.
    """

    def __init__(
        self,
        predictor: VideoPredictor,
        sources: Sequence[VideoSource],
        *,
        shared: bool,
        hold: Future[None] | None = None,
    ) -> None:
        self.outcomes: list[Future[Outcome]] = [Future() for _ in sources]
        for outcome in self.outcomes:
            outcome.set_running_or_notify_cancel()
        self._predictor, self._sources, self._shared, self._hold = predictor, sources, shared, hold
        self._missing = len(sources)
        self._good: dict[int, _Loaded] = {}
        self._lock = threading.Lock()

    def load(self, plan: ViewPlan | None) -> list[Future[Outcome]]:
        """Start decoding; returns where the outcomes will be."""
        for place, source in enumerate(self._sources):
            self._predictor._load(source, plan).add_done_callback(partial(self._loaded, place))
        return self.outcomes

    def _loaded(self, place: int, loading: Future[Clips]) -> None:
        """Take a decoded video, or the reason why there is none."""
        error, source, outcome = loading.exception(), self._sources[place], self.outcomes[place]
        with self._lock:
            if error is None:
                self._good[place] = _Loaded(source, loading.result(), outcome)
            self._missing -= 1
            complete = not self._missing
        if isinstance(error, VideoError):
            outcome.set_result(Outcome(source, None, error))
        elif error is not None:
            outcome.set_exception(error)
        if complete and self._good:
            good = [self._good[place] for place in sorted(self._good)]
            infer = partial(self._predictor._infer, good, shared=self._shared)
            if self._hold is None:
                infer()
            else:
                self._hold.add_done_callback(lambda _: infer())


def finite(given: Inferred) -> Inferred:
    """Return what the network gave, where all of it is numbers.

    Raises:
        InferenceError: if not: what is made of the rest would look like an answer.
    """
    if broken := not_finite(given.outputs):
        raise InferenceError(
            f"the network gives NaN or infinity in {', '.join(broken)} for this video",
            hint="its training diverged, or this variant is too coarse for it: `ivdr verify` compares variants",
        )
    return given


def _neighbours(
    sources: Iterable[VideoSource], size: int, holds: Mapping[int, Future[None]]
) -> Iterator[tuple[Future[None] | None, list[VideoSource]]]:
    """Cut a list into groups of at most ``size`` neighbours, each with its hold; one begins at each of ``holds``."""
    group: list[VideoSource] = []
    hold: Future[None] | None = None
    for position, source in enumerate(sources):
        if group and (len(group) == size or position in holds):
            yield hold, group
            group = []
        hold = holds.get(position, hold)
        group.append(source)
    if group:
        yield hold, group
