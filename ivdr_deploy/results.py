"""What the network says about a video: per clip as it came out, and combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ivdr_deploy.errors import InferenceError, VideoError
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.clips import Clips
from ivdr_deploy.video.reader import VideoInfo
from ivdr_deploy.video.source import VideoSource


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoResult:
    """What the network says about one video. Arrays are float32; a part that the model does not have is None."""

    labels: tuple[str, ...]
    """Class names in the order of ``probabilities``."""

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

    view_plan: ViewPlan
    info: VideoInfo
    decode_ms: float
    preprocess_ms: float
    infer_ms: float
    """Time of the network for this video's share of the calls it was in."""

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the ``k`` most probable labels with their probabilities, best first; ties go to the lower index."""
        return [] if self.probabilities is None else top_labels(self.labels, self.probabilities, k)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """Which model an endpoint answered with."""

    name: str
    version: str
    variant: str
    contract_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteResult:
    """What an endpoint says about one video. A part that was not asked for is empty or None."""

    predictions: tuple[tuple[str, float], ...]
    """Labels with their probabilities, best first."""

    feature: np.ndarray | None
    """float32, as ``VideoResult.feature``; so are ``inter``, ``intra`` and ``clip_seconds``."""

    inter: np.ndarray | None
    intra: np.ndarray | None
    clip_seconds: np.ndarray | None
    info: VideoInfo
    view_plan: ViewPlan
    model: ServedModel
    timings_ms: Mapping[str, float]
    """By stage: ``decode_ms``, ``preprocess_ms``, ``infer_ms``."""

    request_id: str
    """Also in the server's log."""

    body: Mapping[str, Any] = field(repr=False)
    """The answer as it came."""

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the first ``k`` predictions; there are never more than were asked for."""
        return list(self.predictions[:k])


@dataclass(frozen=True, kw_only=True, slots=True)
class RawResult:
    """One video's clips and what the network gave for each: what ``VideoResult`` summarises."""

    clips: Clips
    """Without the pixels: ``clips.video`` is empty, since a run over many videos must not keep them."""

    outputs: Mapping[str, np.ndarray]
    """One array per output, first axis the clips."""

    infer_ms: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One input of ``predict_many``: either a result, or the error that this video alone raised."""

    source: VideoSource
    result: VideoResult | None
    error: VideoError | InferenceError | None
    raw: RawResult | None = field(default=None, repr=False)


def combine_clips(raw: RawResult, *, labels: Sequence[str]) -> VideoResult:
    """Combine the outputs of one video's clips (first axis: clips) into one result."""
    outputs, clips = raw.outputs, raw.clips
    logits, feature, inter = outputs.get("logits"), outputs.get("feature"), outputs.get("inter")
    return VideoResult(
        labels=tuple(labels),
        probabilities=None if logits is None else softmax(logits).mean(axis=0),
        clip_logits=logits,
        feature=None if feature is None else feature.mean(axis=0),
        inter=None if inter is None else _unit(inter.mean(axis=0)),
        intra=outputs.get("intra"),
        clip_seconds=clips.seconds,
        view_plan=clips.view_plan,
        info=clips.info,
        decode_ms=clips.decode_ms,
        preprocess_ms=clips.preprocess_ms,
        infer_ms=raw.infer_ms,
    )


def top_labels(labels: Sequence[str], probabilities: np.ndarray, k: int) -> list[tuple[str, float]]:
    """Return the ``k`` most probable labels with their probabilities, best first; ties go to the lower index."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [(labels[i], float(probabilities[i])) for i in order]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
