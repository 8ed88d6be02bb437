"""The main path, on one page: video -> clips -> network -> one result per video.

``evaluate``, ``predict``, ``score``, ``verify`` and the endpoint all come through here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ivdr_deploy.errors import ConfigError, VideoError
from ivdr_deploy.runtimes.base import LoadedModel, check_batch
from ivdr_deploy.spec import MAX_BATCH, DecoderName
from ivdr_deploy.video.clips import Clips, load_clips
from ivdr_deploy.video.reader import VideoInfo, VideoLimits, VideoSource


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoResult:
    """What the network says about one video. Arrays are float32; a part that the model does not have is None."""

    probabilities: np.ndarray | None
    """(K,) mean over the clips of each clip's softmax."""

    clip_logits: np.ndarray | None
    """(num_clips, K) logits of every clip."""

    feature: np.ndarray | None
    """(F,) mean over the clips."""

    inter: np.ndarray | None
    """(D,) mean over the clips, unit length."""

    intra: np.ndarray | None
    """(num_clips, S, D) slots of every clip in time order; a mean over clips would lose the moments."""

    clip_seconds: np.ndarray
    """(num_clips, 2) first and last frame time of every clip."""

    info: VideoInfo
    decode_ms: float
    preprocess_ms: float
    infer_ms: float
    """Time of the network for this video's share of the batch it ran in."""

    def top(self, labels: Sequence[str], k: int) -> list[tuple[str, float]]:
        """Return the ``k`` most probable labels with their probabilities, best first; ties go to the lower index."""
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(labels[i], float(self.probabilities[i])) for i in order]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One input of ``predict_many``: either a result, or the error that this video alone raised."""

    source: VideoSource
    result: VideoResult | None
    error: VideoError | None


class VideoPredictor:
    """Turns videos into results with one loaded model.

    ``load`` may be called from many threads; ``infer`` from one at a time, as a runtime has one queue.
    """

    def __init__(
        self, model: LoadedModel, *, limits: VideoLimits | None = None, decoder: DecoderName = "pyav"
    ) -> None:
        self.model = model
        self.limits = limits or VideoLimits()
        self.decoder: DecoderName = decoder

    def load(self, source: VideoSource, *, num_clips: int | None = None) -> Clips:
        """Decode one video into the network's input.

        Args:
            source: A path, or the encoded bytes.
            num_clips: Clips to take instead of the contract's number.

        Raises:
            VideoError: if the video cannot be used.
        """
        clip = self.model.clip
        if num_clips is not None:
            if not 1 <= num_clips <= MAX_BATCH:
                raise ConfigError(f"num_clips must be between 1 and {MAX_BATCH}, found {num_clips}")
            clip = replace(clip, num_clips=num_clips)
        return load_clips(source, clip, limits=self.limits, decoder=self.decoder)

    def infer(self, batch: Sequence[Clips]) -> list[VideoResult]:
        """Run the network on the clips of several videos, in as few calls as ``MAX_BATCH`` allows."""
        video = np.concatenate([clips.video for clips in batch])
        check_batch(video, self.model.clip)
        start = time.perf_counter()
        parts = [self.model.runtime.infer(video[i : i + MAX_BATCH]) for i in range(0, len(video), MAX_BATCH)]
        infer_ms = (time.perf_counter() - start) * 1000.0
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        results, offset = [], 0
        for clips in batch:
            rows = slice(offset, offset + len(clips.video))
            offset = rows.stop
            share = infer_ms * len(clips.video) / len(video)
            results.append(summarise({name: value[rows] for name, value in outputs.items()}, clips, share))
        return results

    def predict(self, source: VideoSource, *, num_clips: int | None = None) -> VideoResult:
        """Load and run one video."""
        return self.infer([self.load(source, num_clips=num_clips)])[0]

    def predict_many(
        self, sources: Iterable[VideoSource], *, num_clips: int | None = None, decode_threads: int = 1
    ) -> Iterator[Outcome]:
        """Yield one outcome per source, in order, while the next videos are decoded in the background.

        A video that cannot be used is an outcome with its error; any other exception is a defect and is raised.

        Args:
            sources: Paths or encoded bytes; read lazily, a few ahead.
            num_clips: As in ``load``.
            decode_threads: Decoders that run beside the network. At most ``decode_threads + 1`` decoded videos wait.
        """
        with ThreadPoolExecutor(max_workers=decode_threads, thread_name_prefix="decode") as pool:
            waiting: deque[tuple[VideoSource, Future[Clips]]] = deque()
            try:
                for source in sources:
                    waiting.append((source, pool.submit(self.load, source, num_clips=num_clips)))
                    if len(waiting) > decode_threads:
                        yield self._outcome(*waiting.popleft())
                while waiting:
                    yield self._outcome(*waiting.popleft())
            finally:
                for _, future in waiting:
                    future.cancel()

    def _outcome(self, source: VideoSource, future: Future[Clips]) -> Outcome:
        try:
            clips = future.result()
        except VideoError as error:
            return Outcome(source, None, error)
        return Outcome(source, self.infer([clips])[0], None)


def summarise(outputs: Mapping[str, np.ndarray], clips: Clips, infer_ms: float) -> VideoResult:
    """Combine the outputs of one video's clips (first axis: clips) into one result."""
    logits, feature, inter = outputs.get("logits"), outputs.get("feature"), outputs.get("inter")
    return VideoResult(
        probabilities=None if logits is None else softmax(logits).mean(axis=0),
        clip_logits=logits,
        feature=None if feature is None else feature.mean(axis=0),
        inter=None if inter is None else _unit(inter.mean(axis=0)),
        intra=outputs.get("intra"),
        clip_seconds=clips.seconds,
        info=clips.info,
        decode_ms=clips.decode_ms,
        preprocess_ms=clips.preprocess_ms,
        infer_ms=infer_ms,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
