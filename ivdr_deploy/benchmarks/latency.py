"""From the encoded file to the label, timed by stage, and one variant against another on the same clips.

The order of things: every video is run once untimed, on both, and the outputs are compared; then ``rounds``
times every video is loaded once and its clips are run on both, one right after the other, the order swapped
every other time; then all videos once more through the path that ``ivdr score`` takes, decoding ahead. Files
come from the page cache, which the first pass fills: disks and networks are not measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ivdr_deploy._console import Track, untracked
from ivdr_deploy.benchmarks.timing import Clock, time_ms, time_pair
from ivdr_deploy.datasets.lists import VideoItem, VideoList
from ivdr_deploy.errors import ConfigError, DataError, ParityError, VideoError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.base import LoadedModel, infer_all
from ivdr_deploy.runtimes.compare import TOLERANCE, compare_outputs, describe_failures


@dataclass(kw_only=True, slots=True)
class Samples:
    """What was measured. The lists of milliseconds have one entry per video and round."""

    videos: int = 0
    """Videos that were timed."""

    failed: dict[str, str] = field(default_factory=dict)
    """Uri and error code of the videos that cannot be used; they are not timed."""

    clips: int = 0
    """Clips that were run, over all videos once."""

    rounds: int = 0
    decode_ms: list[float] = field(default_factory=list)
    preprocess_ms: list[float] = field(default_factory=list)
    infer_ms: list[float] = field(default_factory=list)
    reference_ms: list[float] = field(default_factory=list)
    """The reference on the clips of the same entry of ``infer_ms``; empty without one."""

    pipeline_seconds: float = 0.0
    """All videos once, decoding ahead, with the engine."""

    max_abs_diff: dict[str, float] = field(default_factory=dict)
    """Largest difference from the reference per output, over all videos."""


def measure(
    predictor: VideoPredictor,
    reference: LoadedModel | None,
    videos: VideoList,
    *,
    rounds: int = 3,
    clock: Clock = time.perf_counter,
    track: Track = untracked,
) -> Samples:
    """Time one model on real videos.

    Args:
        predictor: The variant of interest, with its decode workers.
        reference: Another variant of the model to compare with; None compares with nothing.
        videos: What to run; labels are not used.
        rounds: Timed passes over the list.
        clock: The clock.
        track: Shows progress.

    Raises:
        ConfigError: if ``rounds`` is below 1.
        ParityError: if the outputs differ by more than the precision allows: then there is nothing to
            compare.
        DataError: if no video can be used.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, found {rounds}")
    samples = Samples(rounds=rounds)
    steps = _passes(videos, rounds=rounds, samples=samples)
    for number, item in track(steps, len(videos.items) * (rounds + 1), "timing"):
        if number == 0:
            _warm_up(item, predictor, reference, samples)
        else:
            _time_video(item, predictor, reference, samples, clock=clock)
    paths = [item.path for item in videos.items if item.uri not in samples.failed]
    _, milliseconds = time_ms(lambda: _drain(predictor, paths), clock=clock)
    samples.pipeline_seconds = milliseconds / 1000.0
    return samples


def _passes(videos: VideoList, *, rounds: int, samples: Samples) -> Iterator[tuple[int, VideoItem]]:
    """Yield the number of the pass and the video, leaving out what failed in pass 0."""
    for number in range(rounds + 1):
        for item in videos.items:
            if item.uri not in samples.failed:
                yield number, item
        if number == 0:
            samples.videos = len(videos.items) - len(samples.failed)
            if not samples.videos:
                codes = ", ".join(sorted(set(samples.failed.values())))
                raise DataError(f"{videos.source}: none of {len(videos.items)} videos can be used ({codes})")


def _warm_up(
    item: VideoItem, predictor: VideoPredictor, reference: LoadedModel | None, samples: Samples
) -> None:
    try:
        clips = predictor.load(item.path)
    except VideoError as error:
        samples.failed[item.uri] = error.code
        return
    samples.clips += len(clips.video)
    runtime = predictor.model.runtime
    found = infer_all(runtime, clips.video)
    if reference is None:
        return
    # The other one may be the coarser of the two.
    coarser = max(runtime.precision, reference.runtime.precision, key=lambda precision: TOLERANCE[precision])
    parity = compare_outputs(infer_all(reference.runtime, clips.video), found, precision=coarser)
    if failures := describe_failures(parity):
        raise ParityError(
            f"{item.uri}: {runtime.description} does not compute what {reference.runtime.description} computes: "
            f"{failures}",
            hint="times of different answers cannot be compared; see `ivdr verify`",
        )
    for entry in parity:
        samples.max_abs_diff[entry.output] = max(
            entry.max_abs_diff, samples.max_abs_diff.get(entry.output, 0.0)
        )


def _time_video(
    item: VideoItem,
    predictor: VideoPredictor,
    reference: LoadedModel | None,
    samples: Samples,
    *,
    clock: Clock,
) -> None:
    clips = predictor.load(item.path)
    runtime = predictor.model.runtime
    if reference is None:
        _, infer_ms = time_ms(lambda: infer_all(runtime, clips.video), clock=clock)
    else:
        other = reference.runtime
        infer_ms, reference_ms = time_pair(
            lambda: infer_all(runtime, clips.video),
            lambda: infer_all(other, clips.video),
            swap=len(samples.infer_ms) % 2 == 1,
            clock=clock,
        )
        samples.reference_ms.append(reference_ms)
    samples.decode_ms.append(clips.decode_ms)
    samples.preprocess_ms.append(clips.preprocess_ms)
    samples.infer_ms.append(infer_ms)


def _drain(predictor: VideoPredictor, paths: list[Path]) -> None:
    for outcome in predictor.predict_many(paths):
        if outcome.error is not None:
            raise outcome.error
