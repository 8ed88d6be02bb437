"""Does every variant of a bundle compute what its reference computes? On golden clips, and on videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ivdr_deploy._console import Track, untracked
from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.artifacts.manifest import OutputParity, Variant
from ivdr_deploy.datasets.lists import VideoItem, VideoList, read_video_list
from ivdr_deploy.errors import ArtifactError, DataError, EngineIncompatibleError, MissingDependencyError
from ivdr_deploy.evaluation.metrics import Accuracy, leave_one_out_recall
from ivdr_deploy.evaluation.verify_report import BadVideo, Flip, VariantReport, VerifyReport
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.results import Outcome, softmax
from ivdr_deploy.runtimes.base import LoadedModel, Runtime
from ivdr_deploy.runtimes.compare import TOLERANCE, compare_outputs
from ivdr_deploy.runtimes.loading import bundle_model
from ivdr_deploy.runtimes.proof import prove_decoder, replay_golden
from ivdr_deploy.runtimes.registry import misfit
from ivdr_deploy.runtimes.variants import open_variant
from ivdr_deploy.spec import DecoderName, Device
from ivdr_deploy.video.reader import VideoLimits


def verify_bundle(
    path: str | Path,
    *,
    data: str | Path | VideoList | None = None,
    variants: Sequence[str] = (),
    limits: VideoLimits | None = None,
    decoder: DecoderName = "pyav",
    track: Track = untracked,
) -> VerifyReport:
    """Check a bundle. A variant that cannot run here has not passed.

    Args:
        path: The bundle.
        data: A list of videos, best with labels; None replays the golden clips only. Each video is decoded
            once and goes through all variants.
        variants: Ids of those to judge; all when empty. The reference runs along where videos are compared.
        limits: What a video may cost.
        decoder: Which decoder reads the videos, the golden ones included.
        track: Wraps the run over the videos.

    Raises:
        ArtifactError: if the bundle is damaged, lacks a variant, or holds no reference to compare videos with.
        GoldenMismatchError: if the decoder here does not give the recorded clips of the golden videos.
        EngineIncompatibleError: if none of the variants can run here.
        MissingDependencyError: if the reference, which videos are compared with, cannot run here.
        DataError: if the list is not usable, a label in it is unknown to the model, or none of its videos can
            be used.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    chosen = [bundle.variant(name) for name in variants] or list(manifest.variants)
    videos = data if data is None or isinstance(data, VideoList) else read_video_list(data, part="test")
    if videos is not None and videos.labels and manifest.labels:
        videos.targets(manifest.labels)  # refuses unknown labels before anything is decoded
    golden = bundle.golden()
    decode_mean_diff = prove_decoder(bundle, golden, decoder)
    with ExitStack() as stack:
        reference = _open_reference(bundle, stack) if videos is not None else None
        opened, absent = _open_variants(bundle, chosen, reference, stack)
        tallies = [_Tally.of(variant, runtime, golden) for variant, runtime in opened]
        first = reference or tallies[0]
        bad_videos: tuple[BadVideo, ...] = ()
        if videos is not None:
            everyone = [first, *(tally for tally in tallies if tally.variant.id != first.variant.id)]
            reading = partial(VideoPredictor, limits=limits, decoder=decoder)
            bad_videos = _run_videos(bundle, videos, everyone, reading, track)
            tallies = [first if tally.variant.id == first.variant.id else tally for tally in tallies]
        reports = [tally.report(first, manifest.labels) for tally in tallies]
    return VerifyReport(
        bundle=str(path),
        name=manifest.name,
        version=manifest.version,
        contract_hash=manifest.contract_hash,
        view_plan=str(manifest.view_plan),
        data=None if videos is None else str(videos.source),
        videos=len(first.items),
        bad_videos=bad_videos,
        decode_mean_diff=decode_mean_diff,
        variants=(*reports, *absent),
    )


def _open_reference(bundle: Bundle, stack: ExitStack) -> _Tally:
    reference = bundle.manifest.reference
    if reference is None:
        raise ArtifactError(
            f"{bundle.path} holds no reference to compare videos with; its variants are "
            f"{', '.join(variant.id for variant in bundle.manifest.variants)}",
            hint="verify the bundle that was exported; without --videos the recorded golden outputs are compared",
        )
    runtime = stack.enter_context(open_variant(bundle, reference))
    return _Tally.of(reference, runtime, bundle.golden())


def _open_variants(
    bundle: Bundle, chosen: Sequence[Variant], reference: _Tally | None, stack: ExitStack
) -> tuple[list[tuple[Variant, Runtime]], list[VariantReport]]:
    """Open every variant that can run here, and report those that cannot."""
    opened: list[tuple[Variant, Runtime]] = []
    absent = []
    for variant in chosen:
        if reference is not None and variant.id == reference.variant.id:
            opened.append((variant, reference.runtime))
            continue
        device: Device = variant.target.device or "cpu"
        if reason := misfit(variant, device):
            absent.append(VariantReport(id=variant.id, not_run=reason))
            continue
        try:
            opened.append((variant, stack.enter_context(open_variant(bundle, variant, device=device))))
        except (EngineIncompatibleError, MissingDependencyError) as error:
            absent.append(VariantReport(id=variant.id, not_run=str(error)))
    if not opened:
        reasons = "; ".join(f"{report.id}: {report.not_run}" for report in absent)
        raise EngineIncompatibleError(
            f"no variant of {bundle.path} can run here ({reasons or 'it holds none'})"
        )
    return opened, absent


@dataclass(kw_only=True)
class _Tally:
    """What one variant gave, video by video."""

    variant: Variant
    runtime: Runtime
    golden: tuple[OutputParity, ...]
    items: list[VideoItem] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    parity: dict[str, list[OutputParity]] = field(default_factory=dict)

    @classmethod
    def of(cls, variant: Variant, runtime: Runtime, golden: Golden) -> _Tally:
        return cls(variant=variant, runtime=runtime, golden=replay_golden(golden, runtime))

    def add(
        self, item: VideoItem, outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
    ) -> None:
        """Take the outputs of one video's clips, and the reference's for the same clips."""
        self.items.append(item)
        if "logits" in outputs:
            self.probabilities.append(softmax(outputs["logits"]).mean(axis=0))
        if "feature" in outputs:
            self.features.append(outputs["feature"].mean(axis=0))
        if outputs is not reference:
            for entry in compare_outputs(reference, outputs, precision=self.runtime.precision):
                self.parity.setdefault(entry.output, []).append(entry)

    def report(self, reference: _Tally, labels: Sequence[str]) -> VariantReport:
        top = [int(row.argmax()) for row in self.probabilities]
        expected = [int(row.argmax()) for row in reference.probabilities]
        flips = tuple(
            Flip(uri=item.uri, expected=labels[old], found=labels[new], margin=float(row[old] - row[new]))
            for item, row, old, new in zip(self.items, reference.probabilities, expected, top, strict=False)
            if old != new
        )
        labelled = bool(self.items) and all(item.label is not None for item in self.items)
        truth = [str(item.label) for item in self.items]
        correct = sum(labels[index] == label for index, label in zip(top, truth, strict=False))
        classes = {label: index for index, label in enumerate(sorted(set(truth)))}
        retrieval = None
        if labelled and len(self.features) > 1:
            retrieval = leave_one_out_recall(np.stack(self.features), [classes[label] for label in truth])
        return VariantReport(
            id=self.variant.id,
            description=self.runtime.description,
            golden=self.golden,
            parity=tuple(_together(entries) for entries in self.parity.values()),
            agreement=None if self is reference or not top else Accuracy(len(top) - len(flips), len(top)),
            flips=flips,
            flip_margin=TOLERANCE[self.runtime.precision],
            accuracy=Accuracy(correct, len(top)) if labelled and top else None,
            retrieval=retrieval,
        )


def _together(entries: Sequence[OutputParity]) -> OutputParity:
    """Join the comparisons of several videos: the one that fits worst, with the smallest cosine of all."""
    worst = max(entries, key=lambda entry: entry.max_abs_diff / entry.tolerance)
    return replace(worst, min_cosine=min(entry.min_cosine for entry in entries))


class _SideBySide(Runtime):
    """Feeds every batch to several runtimes, so that a video is decoded once; outputs are named ``place/name``."""

    def __init__(self, runtimes: Sequence[Runtime]) -> None:
        first = runtimes[0]
        self.name, self.precision, self.output_names = first.name, first.precision, first.output_names
        self.call_clips = min(runtime.call_clips for runtime in runtimes)
        self.description = " beside ".join(runtime.description for runtime in runtimes)
        self._runtimes = tuple(runtimes)

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        return {
            f"{place}/{name}": value
            for place, runtime in enumerate(self._runtimes)
            for name, value in runtime.infer(video).items()
        }

    def close(self) -> None:
        """Nothing: whoever opened the runtimes closes them."""


def _run_videos(
    bundle: Bundle,
    videos: VideoList,
    tallies: Sequence[_Tally],
    reading: Callable[[LoadedModel], VideoPredictor],
    track: Track,
) -> tuple[BadVideo, ...]:
    """Put every video through all variants, the reference first; return those that cannot be used."""
    runtime = _SideBySide([tally.runtime for tally in tallies])
    model = bundle_model(bundle, runtime, tallies[0].variant)
    bad = []
    with reading(model) as predictor:
        outcomes = predictor.predict_many(item.path for item in videos.items)
        watched: Sequence[Outcome] = track(outcomes, len(videos.items), "verifying")  # type: ignore[assignment]
        for item, outcome in zip(videos.items, watched, strict=True):
            if outcome.error is not None:
                bad.append(BadVideo(uri=item.uri, **outcome.error.to_dict()))
                continue
            assert outcome.raw is not None
            parts: list[dict[str, np.ndarray]] = [{} for _ in tallies]
            for key, value in outcome.raw.outputs.items():
                place, name = key.split("/", 1)
                parts[int(place)][name] = value
            for tally, outputs in zip(tallies, parts, strict=True):
                tally.add(item, outputs, parts[0])
    if len(bad) == len(videos.items):
        raise DataError(
            f"{videos.source}: none of its {len(bad)} videos can be used; the first: {bad[0].message}",
            hint="check the paths; `ivdr predict BUNDLE VIDEO` says more about one",
        )
    return tuple(bad)
