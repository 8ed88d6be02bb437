"""Does every variant of a bundle compute what its reference computes? On golden clips, and on videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ivdr_deploy._console import Track, untracked
from ivdr_deploy._optional import require
from ivdr_deploy._text import few, quoted, quoted_few
from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.manifest import SHOWN_VARIANTS, Variant
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.environment import has_nvidia_driver
from ivdr_deploy.errors import (
    ArtifactError,
    DataError,
    DeviceError,
    EngineIncompatibleError,
    InferenceError,
    MissingDependencyError,
)
from ivdr_deploy.evaluation.invariance import Probe
from ivdr_deploy.evaluation.judging import judge
from ivdr_deploy.evaluation.records import now, read_record
from ivdr_deploy.evaluation.skew import measure_skew
from ivdr_deploy.evaluation.tally import NotOpened, SideBySide, Tally
from ivdr_deploy.evaluation.thresholds import thresholds_for
from ivdr_deploy.evaluation.verify_report import BadVideo, SkewedVideo, VariantReport, VerifyReport
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.results import Outcome
from ivdr_deploy.runtimes.base import LoadedModel, Runtime
from ivdr_deploy.runtimes.loading import bundle_model
from ivdr_deploy.runtimes.proof import prove_decoder
from ivdr_deploy.runtimes.registry import REGISTRY, misfit
from ivdr_deploy.runtimes.variants import open_variant
from ivdr_deploy.spec import DecoderName, Device
from ivdr_deploy.video.reader import VideoLimits


def verify_bundle(
    path: str | Path,
    *,
    data: str | Path | VideoList | None = None,
    variants: Sequence[str] = (),
    device: Device = "cpu",
    limits: VideoLimits | None = None,
    decoder: DecoderName = "pyav",
    decoder_skew: bool = False,
    track: Track = untracked,
) -> VerifyReport:
    """Measure and judge a bundle. A variant that cannot run here, or fails on the way, has not passed.

    The bundle stays as it is: ``records.keep_records`` puts what was measured into it.

    Args:
        path: The bundle.
        data: A list of videos, best with labels; None runs the golden clips only. Each video is decoded once and goes
            through all variants.
        variants: Ids of those to judge; when empty all but machine code, which runs only when it is named. The
            reference runs along where videos are compared.
        device: Where what runs on either device is judged. A variant that is made for one is judged there, and the
            reference that videos are compared with stays on the CPU.
        limits: What a video may cost.
        decoder: Which decoder reads the videos, the golden ones included.
        decoder_skew: Also decode every video with PyAV and OpenCV, and compare clips and labels.
        track: Wraps the run over the videos.

    Raises:
        ArtifactError: if the bundle is damaged, lacks a variant, or holds no reference to compare videos with; or no
            golden clips, and there are no videos.
        GoldenMismatchError: if the decoder here does not give the recorded clips of the golden videos.
        DeviceError: if ``device`` is a GPU, and there is none.
        EngineIncompatibleError: if none of the variants can run here.
        MissingDependencyError: if the reference, which videos are compared with, cannot run here; or OpenCV, which the
            skew needs.
        DataError: if the list is not usable, a label in it is unknown to the model, or none of its videos can
            be used.
        InferenceError: if the reference fails on every video.
    """
    if decoder_skew:
        require("cv2", extra="opencv")  # before the minutes of work that would be lost
    if device == "cuda" and not has_nvidia_driver():
        raise DeviceError(
            "device 'cuda' was asked for, but no NVIDIA driver was found",
            hint="use device 'cpu', or see `ivdr doctor`",
        )
    bundle = open_bundle(path)
    manifest = bundle.manifest
    chosen = [bundle.variant(name) for name in dict.fromkeys(variants)] or list(manifest.variants)
    videos = data if data is None or isinstance(data, VideoList) else read_video_list(data, part="test")
    if videos is not None and videos.labels and manifest.labels:
        videos.targets(manifest.labels)  # refuses unknown labels before anything is decoded
    golden = bundle.golden()
    if videos is None and golden.video is None:
        raise ArtifactError(
            f"{bundle.path} holds no golden clips, so without videos there is nothing to judge by",
            hint="give some: `ivdr verify BUNDLE --videos LIST`",
        )
    reading = partial(VideoPredictor, limits=limits)
    with ExitStack() as stack:
        reference = _open_reference(bundle, stack) if videos is not None else None
        opened, absent = _open_variants(bundle, chosen, reference, stack, device=device, named=bool(variants))
        # After the variants: they know their contract, so a wrong one is named.
        decode_mean_diff = prove_decoder(bundle, golden, decoder)
        watched = track(opened, len(opened), "replaying golden clips")
        tallies = [Tally(variant, runtime, golden) for variant, runtime in watched]
        first = reference or tallies[0]
        judged = [first if tally.variant.id == first.variant.id else tally for tally in tallies]
        bad_videos = _measure(
            bundle, videos, first, judged, partial(reading, decoder=decoder), track, reference=reference
        )
        skew: tuple[SkewedVideo, ...] = ()
        if videos is not None and decoder_skew:
            skew = measure_skew(bundle_model(bundle, first.runtime, first.variant), videos, reading, track)
        facts = {
            "reference": "" if reference is None else reference.variant.id,
            "view_plan": str(manifest.view_plan),
            "decoder": decoder,
            "data": "" if videos is None else str(videos.source),
            "measured_at": now(),
            "bad_videos": len(bad_videos),
        }
        records = [tally.record(first, manifest, facts) for tally in judged]
    reports = [judge(record, thresholds_for(record.precision)) for record in records]
    return _report(
        bundle,
        data=None if videos is None else str(videos.source),
        videos=len(first.items),
        bad_videos=bad_videos,
        decode_mean_diff=decode_mean_diff,
        skew=skew,
        variants=(*reports, *absent),
    )


def recheck_bundle(
    path: str | Path, *, variants: Sequence[str] = (), thresholds: dict[str, float] | None = None
) -> VerifyReport:
    """Judge what an earlier run kept in the bundle; runs nothing, and leaves the bundle as it is.

    Args:
        path: The bundle.
        variants: Ids of those to judge; by default all, and one without a record has not passed.
        thresholds: Other values for some of them, see ``thresholds.parse_thresholds``.

    Raises:
        ArtifactError: if the bundle is damaged, lacks a variant, or holds no record of any, or of one that was named.
    """
    bundle = open_bundle(path)
    chosen = [bundle.variant(name) for name in dict.fromkeys(variants)]
    chosen = chosen or [variant for variant in bundle.manifest.variants if variant.verification]
    if not chosen:
        raise ArtifactError(
            f"{path} holds no record of a verification",
            hint="make one first: `ivdr verify BUNDLE --videos LIST`",
        )
    records = [read_record(bundle, variant) for variant in chosen]
    reports = [judge(record, thresholds_for(record.precision, thresholds)) for record in records]
    absent = [
        VariantReport(id=variant.id, not_run="it holds no record of a verification")
        for variant in bundle.manifest.variants
        if not variants and variant not in chosen
    ]
    return _report(
        bundle,
        data=records[0].data,
        videos=max(len(record.videos.uris) for record in records),
        variants=(*reports, *absent),
    )


def _report(bundle: Bundle, *, variants: Sequence[VariantReport], **measured: Any) -> VerifyReport:
    manifest, judged = bundle.manifest, {variant.id for variant in variants}
    return VerifyReport(
        bundle=str(bundle.path),
        name=manifest.name,
        version=manifest.version,
        contract_hash=manifest.contract_hash,
        view_plan=str(manifest.view_plan),
        variants=tuple(variants),
        not_named=tuple(variant.id for variant in manifest.variants if variant.id not in judged),
        **measured,
    )


def _open_reference(bundle: Bundle, stack: ExitStack) -> Tally:
    reference = bundle.manifest.reference
    if reference is None:
        raise ArtifactError(
            f"{bundle.path} holds no reference to compare videos with; its variants are "
            f"{quoted_few([variant.id for variant in bundle.manifest.variants], most=SHOWN_VARIANTS)}",
            hint="verify the bundle that was exported; without --videos the recorded golden outputs are compared",
        )
    runtime = stack.enter_context(open_variant(bundle, reference))
    return Tally(reference, runtime, bundle.golden())


def _open_variants(
    bundle: Bundle,
    chosen: Sequence[Variant],
    reference: Tally | None,
    stack: ExitStack,
    *,
    device: Device,
    named: bool,
) -> tuple[list[tuple[Variant, Runtime]], list[VariantReport]]:
    """Open every variant that can run here, and report those that cannot, or must not unless they are named."""
    opened: list[tuple[Variant, Runtime]] = []
    absent = []
    for variant in chosen:
        if reference is not None and variant.id == reference.variant.id:
            opened.append((variant, reference.runtime))
            continue
        if REGISTRY[variant.runtime].machine_code and not named:
            why = f"it is machine code, which runs only when it is named: --variant {quoted(variant.id)}"
            absent.append(VariantReport(id=variant.id, not_run=why))
            continue
        place = variant.target.device or device
        if reason := misfit(variant, place):
            absent.append(VariantReport(id=variant.id, not_run=reason))
            continue
        try:
            opened.append((variant, stack.enter_context(open_variant(bundle, variant, device=place))))
        except (DeviceError, EngineIncompatibleError, MissingDependencyError) as error:
            absent.append(VariantReport(id=variant.id, not_run=str(error)))
        except Exception as error:  # noqa: BLE001  # a runtime raises what it likes
            opened.append((variant, NotOpened(variant, error)))
    if not opened:
        reasons = [f"{report.id}: {report.not_run}" for report in absent] or ["it holds none"]
        raise EngineIncompatibleError(
            f"no variant of {bundle.path} can run here ({few(reasons, most=SHOWN_VARIANTS, joint='; ')})"
        )
    return opened, absent


def _measure(
    bundle: Bundle,
    videos: VideoList | None,
    first: Tally,
    judged: Sequence[Tally],
    reading: Callable[[LoadedModel], VideoPredictor],
    track: Track,
    *,
    reference: Tally | None,
) -> tuple[BadVideo, ...]:
    """Put the videos and every size and place of a batch through what is judged; return the videos that are no use."""
    everyone = [first, *(tally for tally in judged if tally is not first)]
    bad_videos: tuple[BadVideo, ...] = ()
    seen: Sequence[Probe] = ()
    if videos is not None:
        together = SideBySide(everyone)
        bad_videos = _run_videos(bundle, videos, everyone, together, reading, track)
        seen = together.seen
    for tally in track(judged, len(judged), "trying batch sizes"):
        # What the others are held against came by in whole calls already.
        tally.probe(seen, place=everyone.index(tally), batches=tally is not reference)
    return bad_videos


def _run_videos(
    bundle: Bundle,
    videos: VideoList,
    tallies: Sequence[Tally],
    together: SideBySide,
    reading: Callable[[LoadedModel], VideoPredictor],
    track: Track,
) -> tuple[BadVideo, ...]:
    """Put every video through all variants, the reference first; return those that cannot be used."""
    model = bundle_model(bundle, together, tallies[0].variant)
    bad = []
    with reading(model) as predictor:
        outcomes = predictor.predict_many(item.path for item in videos.items)
        watched: Sequence[Outcome] = track(outcomes, len(videos.items), "verifying")  # type: ignore[assignment]
        for item, outcome in zip(videos.items, watched, strict=True):
            if outcome.error is not None:  # of the video or of the reference: the others never raise
                bad.append(BadVideo(uri=item.uri, **outcome.error.to_dict()))
                continue
            assert outcome.raw is not None
            parts = SideBySide.apart(outcome.raw.outputs, len(tallies))
            for tally, outputs in zip(tallies, parts, strict=True):
                tally.add(item, outputs, parts[0])
    if all(video.code == InferenceError.code for video in bad) and len(bad) == len(videos.items):
        raise InferenceError(
            f"{videos.source}: the reference fails on each of its {len(bad)} videos; {bad[0].uri}: {bad[0].message}",
            hint="verify where the reference can run them",
        )
    if len(bad) == len(videos.items):
        raise DataError(
            f"{videos.source}: none of its {len(bad)} videos can be used; the first: {bad[0].message}",
            hint="check the paths; `ivdr predict BUNDLE VIDEO` says more about one",
        )
    return tuple(bad)
