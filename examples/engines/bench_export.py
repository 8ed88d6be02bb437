"""``make bench-export``: every backbone of convolutions in every engine that can be built here, proved and timed.

For each: a network (see ``networks``), ``ivdr export`` with every engine, ``ivdr verify`` on the test videos, and
``ivdr bench --speeds``, all through the functions behind those commands. The report is written after each backbone, and
one of an earlier run is carried on: what was not measured again stays, with the machine that it was measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.choices import chosen
from examples.demo.figures import make_figures
from examples.engines.networks import HOW, write_network
from ivdr_deploy._console import console, exiting, progress
from ivdr_deploy._files import scratch_folder
from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.benchmarks.engines import TURN_SECONDS, TURNS, Timing, time_variants, timed_variants
from ivdr_deploy.benchmarks.report import write_report
from ivdr_deploy.benchmarks.speeds import found_speeds, keep_speeds
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.environment import environment_facts, has_nvidia_driver
from ivdr_deploy.errors import ConfigError, DataError, IvdrError
from ivdr_deploy.evaluation.records import keep_records
from ivdr_deploy.evaluation.verify import verify_bundle
from ivdr_deploy.export.bundle_export import add_each, export_bundle
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.steps import STEPS, Request, StepOptions, buildable_steps
from ivdr_deploy.models.backbones import BACKBONES
from ivdr_deploy.runtimes.registry import misfit
from ivdr_deploy.spec import ClipSpec, Device
from ivdr_deploy.video.reader import VideoLimits

CLIP = ClipSpec(num_frames=16, frame_stride=2, short_side=128, crop_size=112)
"""The same for every backbone, ``i3d`` and ``s3d`` too, whose published weights are for larger clips."""

BACKBONE_NAMES = tuple(name for name, entry in BACKBONES.items() if not entry.fixed_size)
FIGURES = {
    "top1_agreement": "agreement",
    "flips": "flips",
    "min_cosine": "min_cosine",
    "max_relative_diff": "max_relative_diff",
    "batch_flips": "batch_flips",
    "confidence_shift": "confidence_shift",
    "accuracy": "accuracy",
}
"""Names in the report, and in ``artifacts.verification``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How one run measures."""

    turns: int = TURNS
    turn_seconds: float = TURN_SECONDS
    threads: int = 2
    clip: ClipSpec = CLIP
    checkpoints: Path | None = None
    """A folder of trained networks, ``BACKBONE.safetensors``; one of random weights is made where none is there."""

    requests: Sequence[Request] | None = None
    """Engines and precisions besides onnx fp32; every one that can be built here when None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The videos: networks are set, and int8 is calibrated, on the first list; all are compared on the second."""

    train: VideoList
    test: VideoList


@dataclass
class Export:
    """One backbone's bundle in the making."""

    bundle: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the step that made it, by the id of the variant."""

    not_built: dict[str, str] = field(default_factory=dict)
    """Reasons, by engine and precision."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.engines.bench_export", description=__doc__)
    parser.add_argument("--backbones", default=" ".join(BACKBONE_NAMES), help="names, with blanks between")
    parser.add_argument("--turns", type=int, default=TURNS, help="turns of each engine")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--data", type=Path, help="folder with train.csv and test.csv; default: made videos")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="folder of trained networks, NAME.safetensors; default: random weights",
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/export.json"), help="the report")
    given = parser.parse_args(arguments)
    with exiting("bench-export"):
        names = chosen(given.backbones, BACKBONES, what="backbone")
        if given.checkpoints and not any(_trained(given.checkpoints, name) for name in names):
            raise ConfigError(
                f"{given.checkpoints} has no trained network of {', '.join(names)}",
                hint="its files are called by the backbone: r3d_18.safetensors",
            )
        settings = Settings(turns=given.turns, threads=given.threads, checkpoints=given.checkpoints)
        with scratch_folder("ivdr-bench-export-") as scratch:
            data = find_data(given.data, scratch)
            failed = [name for name in names if not run(name, data, settings, given.out, scratch)]
        console.print(f"report: {given.out}", markup=False)
        if failed:
            raise SystemExit(1)


def find_data(folder: Path | None, scratch: Path) -> Data:
    """Read the lists of a folder; of the real clips where ``IVDR_TEST_DATA`` names them, of made videos elsewhere."""
    real = Path(os.environ.get("IVDR_TEST_DATA", "")) / "actions-mini"
    if folder is None and (real / "train.csv").is_file():
        folder = real
    if folder is None:
        folder = scratch / "videos"
        make_figures(folder, train_actors=8, test_actors=6)
    data = Data(train=read_video_list(folder / "train.csv"), test=read_video_list(folder / "test.csv"))
    for videos in (data.train, data.test):
        videos.require_labels()
    if unknown := set(data.test.labels) - set(data.train.labels):
        raise DataError(f"{data.test.source} has {len(unknown)} classes that {data.train.source} has not")
    return data


def run(name: str, data: Data, settings: Settings, out: Path, scratch: Path) -> bool:
    """Measure one backbone and write it into the report; returns whether it could be measured."""
    console.rule(f"[bold]{name}", align="left")
    facts = environment_facts()  # its load is that from before
    try:
        found = measure(name, data, settings, scratch)
    except IvdrError as error:
        found = {"error": str(error)}
        console.print(f"{name}: {error}", style="red", markup=False)
    report = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"backbones": {}}
    report["how"] = HOW
    report["backbones"][name] = {**found, "environment": facts}
    write_report(report, out)
    return "error" not in found


def measure(name: str, data: Data, settings: Settings, scratch: Path) -> dict[str, Any]:
    """Export, verify and time one backbone.

    Raises:
        IvdrError: if it cannot be exported to fp32 ONNX, compared or timed.
    """
    with scratch_folder("ivdr-bench-export-") as folder:
        with console.status("making the network, and exporting it"):
            trained = _trained(settings.checkpoints, name)
            made_here = folder / "network.safetensors"
            checkpoint = trained or write_network(made_here, name, data.train, settings.clip)
            made = export(checkpoint, folder / "bundle", data, settings)
        # All variants were built here, a moment ago: machine code is named, and runs.
        named = [held.id for held in open_bundle(made.bundle).manifest.variants]
        report = verify_bundle(made.bundle, data=data.test, variants=named, track=progress)
        bundle = keep_records(made.bundle, report.variants)
        device: Device = "cuda" if has_nvidia_driver() else "cpu"
        fitting = [held.id for held in bundle.manifest.variants if not misfit(held, device)]
        chosen, _ = timed_variants(bundle, fitting, device=device)  # also what failed its verification
        timing = time_variants(
            bundle,
            chosen,
            device=device,
            threads=settings.threads,
            turns=settings.turns,
            turn_seconds=settings.turn_seconds,
            track=progress,
        )
        keep_speeds(bundle, found_speeds(bundle, timing))
        network = "random" if trained is None else "trained"
        return {"network": network, **_entry(open_bundle(made.bundle), made, timing, data)}


def _trained(folder: Path | None, name: str) -> Path | None:
    """Return the trained network of a backbone, where there is one."""
    path = None if folder is None else folder / f"{name}.safetensors"
    return path if path is not None and path.is_file() else None


def export(checkpoint: Path, out: Path, data: Data, settings: Settings) -> Export:
    """Make a bundle with every variant that can be made here; what cannot has its reason."""
    made = Export(bundle=out)
    start = time.perf_counter()
    bundle = export_bundle(checkpoint, out, name="bench")
    made.seconds |= dict.fromkeys(_ids(bundle), time.perf_counter() - start)
    options = StepOptions(calibration=Calibration(videos=data.train, limits=VideoLimits()))
    buildable, reasons = buildable_steps(options)
    wanted = []
    for request in STEPS:
        label = " ".join(request)
        if request == ("onnx", "fp32"):
            continue
        if settings.requests is not None and request not in settings.requests:
            made.not_built[label] = "left out of this run"
        elif request[0] == "trt" and not has_nvidia_driver():
            made.not_built[label] = "needs a GPU: a plan that was not run is neither proved nor timed"
        elif request not in buildable:
            made.not_built[label] = reasons[request]
        else:
            wanted.append(request)
    for attempt in add_each(out, wanted, options):
        made.seconds |= dict.fromkeys(attempt.made, attempt.seconds)
        if attempt.failure:
            made.not_built[" ".join(attempt.request)] = attempt.failure[:300]
    return made


def _ids(bundle: Bundle) -> list[str]:
    return [variant.id for variant in bundle.manifest.variants]


def _entry(bundle: Bundle, made: Export, timing: Timing, data: Data) -> dict[str, Any]:
    variants = bundle.manifest.variants
    passing = {
        held.id: held.speed.over_reference
        for held in variants
        if held.derived_from is not None and held.verified and held.speed is not None
    }
    best = max(passing, key=lambda name: passing[name], default=None)
    return {
        "export_seconds": made.seconds["onnx-fp32"],
        "best_over_eager": None if best is None else passing[best],
        "best": best,
        "eager_ms": timing.ms_per_clip(timing.reference),
        "clip": "x".join(map(str, timing.clip_shape[:3])),
        "threads": timing.threads,
        "batch": timing.batch,
        "videos": len(data.test.items),
        "data": f"{data.test.source.parent.name}/{data.test.source.name}",
        "variants": {held.id: _variant(bundle, held, made) for held in variants},
        "not_built": made.not_built,
        "order": list(timing.order),
        "turn_ms": {name: list(values) for name, values in timing.ms.items()},
    }


def _variant(bundle: Bundle, held: Variant, made: Export) -> dict[str, Any]:
    verification, speed = held.verification, held.speed
    figures = verification.figures if verification else {}
    return {
        "precision": held.precision,
        "export_seconds": made.seconds[held.id],
        "size_mb": sum(bundle.manifest.entry(name).size_bytes for name in held.files) / 1e6,
        "verified": held.verified,
        "failed": list(verification.failed) if verification else [],
        **{name: figures.get(kept) for name, kept in FIGURES.items()},
        "over_eager": speed.over_reference if speed else None,
        "over_eager_low": speed.low if speed else None,
        "over_eager_high": speed.high if speed else None,
        "ms_per_clip": speed.ms_per_clip if speed else None,
        "runtime": speed.runtime if speed else None,
    }


if __name__ == "__main__":
    main()
