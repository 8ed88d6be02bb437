"""The order audit: what becomes of accuracy and features when time is turned round or its segments are shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ivdr_deploy._console import progress, say_left_out
from ivdr_deploy.batching import ClipBatcher
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.decoding import DecodeOptions, DecodePool
from ivdr_deploy.errors import CheckpointError, ConfigError, InferenceError, VideoError
from ivdr_deploy.evaluation.bootstrap import Estimate, mean_estimate
from ivdr_deploy.evaluation.order import feature_change, reversed_clips, shuffled_clips
from ivdr_deploy.pipeline import finite
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video import PathSource, VideoLimits
from ivdr_deploy.video.clips import load_clips
from train.answers import VideoAnswer, answer, by_class, units_of, video_estimate

CHANGES = ("true", "reversed", "shuffled")


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderAudit:
    """The same videos three times: as they are, backwards, and with shuffled segments."""

    model: str
    data: str
    labels: tuple[str, ...]
    segments: int
    units: str
    answers: dict[str, tuple[VideoAnswer, ...]]
    """By ``CHANGES``."""

    feature_changes: dict[str, tuple[float, ...]]
    """By ``reversed`` and ``shuffled``: 1 - cosine to the true feature, NaN where there is none."""

    left_out: tuple[LeftOut, ...] = ()
    """What the listing passed over."""

    def drop(self, change: str) -> Estimate:
        """Estimate by how much video accuracy falls under a change, paired by video."""
        pairs = zip(self.answers["true"], self.answers[change], strict=True)
        return mean_estimate(
            [float(true.right) - float(other.right) for true, other in pairs],
            [one.unit for one in self.answers["true"]],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "protocol": "order",
            "model": self.model,
            "data": self.data,
            "segments": self.segments,
            "intervals_over": self.units,
            "video_accuracy": {name: video_estimate(self.answers[name]).to_dict() for name in CHANGES},
            "drop": {name: self.drop(name).to_dict() for name in CHANGES[1:]},
            "feature_change": {name: _mean(self.feature_changes[name]) for name in CHANGES[1:]},
            "per_class": self.per_class(),
            "failed": [
                {"uri": one.item.uri, "reason": one.error}
                for one in self.answers["true"]
                if one.probabilities is None
            ],
            "left_out": [asdict(entry) for entry in self.left_out],
        }

    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """Return videos, accuracies and feature changes of every class that was asked for."""
        accuracies = {name: by_class(self.answers[name], self.labels) for name in CHANGES}
        out: dict[str, dict[str, float | int | None]] = {}
        for place, label in enumerate(self.labels):
            rows = [row for row, one in enumerate(self.answers["true"]) if one.target == place]
            if not rows:
                continue
            out[label] = {"videos": len(rows)}
            out[label] |= {f"accuracy_{name}": accuracies[name][label].value for name in CHANGES}
            for name in CHANGES[1:]:
                out[label][f"feature_change_{name}"] = _mean(
                    [self.feature_changes[name][row] for row in rows]
                )
        return out


def audit_order(
    model: LoadedModel,
    videos: VideoList,
    *,
    segments: int = 0,
    plan: ViewPlan | None = None,
    limits: VideoLimits | None = None,
    decode: DecodeOptions | None = None,
) -> OrderAudit:
    """Run a model on every video three times. The order of the segments is drawn from a fixed seed.

    Args:
        model: With the outputs ``logits`` and ``feature``.
        videos: Labelled.
        segments: Of a clip; those of the model's slots when 0, or 2 where it has none.
        plan: Which clips of each video; the model's own plan when None.
        limits: What a video may cost.
        decode: The decode workers.

    Raises:
        CheckpointError: if the model lacks one of the outputs.
        ConfigError: if the segments do not divide a clip.
        DataError: if labels or files are missing, or a class is unknown.
    """
    lacking = {"logits", "feature"} - set(model.output_names)
    if lacking:
        raise CheckpointError(f"{model.path} has no output {sorted(lacking)[0]}, which the order audit needs")
    segments = segments or int(model.manifest.get("model", {}).get("num_slots", 0) or 2)
    segments = max(2, segments)
    if model.clip.num_frames % segments:
        raise ConfigError(f"{segments} segments do not divide a clip of {model.clip.num_frames} frames")
    say_left_out(videos.left_out)
    targets = videos.targets(model.labels)
    videos.require_files()
    plan = plan or model.view_plan
    units, said = units_of(videos.items)
    tally = _Tally(segments, ClipBatcher(model.runtime.infer))
    calls = ((PathSource(item.path), model.clip, plan) for item in videos.items)
    with DecodePool(decode) as pool:
        decoded = pool.each(load_clips, calls, limits=limits or VideoLimits())
        watched = progress(decoded, total=len(videos.items), description="order audit")
        for item, unit, target, clips in zip(videos.items, units, targets, watched, strict=True):
            if isinstance(clips, VideoError):
                tally.failed(answer(item, unit, target, clips, clips=plan.max_views))
                continue
            try:
                tally.add(item, unit, target, clips.video)
            except InferenceError as error:
                tally.failed(answer(item, unit, target, error, clips=plan.max_views))
    return OrderAudit(
        model=str(model.path),
        data=str(videos.source),
        labels=model.labels,
        segments=segments,
        units=said,
        answers={name: tuple(found) for name, found in tally.answers.items()},
        feature_changes={name: tuple(found) for name, found in tally.changes.items()},
        left_out=videos.left_out,
    )


class _Tally:
    """What was found so far."""

    def __init__(self, segments: int, network: ClipBatcher) -> None:
        self._segments, self._network, self._rng = segments, network, np.random.default_rng(21)
        self.answers: dict[str, list[VideoAnswer]] = {name: [] for name in CHANGES}
        self.changes: dict[str, list[float]] = {name: [] for name in CHANGES[1:]}

    def failed(self, one: VideoAnswer) -> None:
        """Count a video that could not be used, in every order."""
        for found in self.answers.values():
            found.append(one)
        for values in self.changes.values():
            values.append(float("nan"))

    def add(self, item: VideoItem, unit: str, target: int, clips: np.ndarray) -> None:
        """Run the network on clips (N, T, H, W, 3) of a video, and on what is made of them.

        Raises:
            InferenceError: if it fails on one of them or gives no numbers: nothing is counted then, since the answers
                are compared with each other.
        """
        ways = {
            "true": clips,
            "reversed": reversed_clips(clips),
            "shuffled": shuffled_clips(clips, self._segments, rng=self._rng),
        }
        outputs = {name: finite(self._network.run(video)).outputs for name, video in ways.items()}
        for name, found in self.answers.items():
            found.append(answer(item, unit, target, outputs[name]["logits"], clips=len(clips)))
        for name, values in self.changes.items():
            values.append(feature_change(outputs["true"]["feature"], outputs[name]["feature"]))


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None
