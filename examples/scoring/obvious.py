"""The pipeline that one writes first, against ``ivdr score`` with each variant, on the same weights and files.

It decodes all frames, puts them through torchvision's transforms, and runs the network in eager fp32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.engines.bench_export import CLIP, find_data
from examples.engines.networks import write_network
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import decode_workers
from ivdr_deploy.evaluation.records import keep_records
from ivdr_deploy.evaluation.verify import verify_bundle
from ivdr_deploy.export.bundle_export import add_variants, export_bundle
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.steps import StepOptions
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.scorer import score_with
from ivdr_deploy.scoring.task import Task, open_predictor
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video.reader import VideoLimits

PLAN = ViewPlan(num_clips=4)
ROUNDS = 2
"""In each, every pipeline has its turn."""


def over_reference(checkpoint: Path | None, scratch: Path) -> dict[str, Any]:
    """Measure the compiled fp32 and the int8 variants of a network against the obvious pipeline.

    Args:
        checkpoint: The network; one of random weights when None, see ``examples.engines.networks``.
        scratch: For the bundle and the tables.

    Returns:
        ``over_reference_pipeline``: of the fastest variant that passed its verification, on the same videos.
    """
    data = find_data(None, scratch)
    checkpoint = checkpoint or write_network(scratch / "r3d_18.safetensors", "r3d_18", data.train, CLIP)
    export_bundle(checkpoint, scratch / "r3d_18")
    calibration = Calibration(videos=data.train, limits=VideoLimits())
    options = StepOptions(calibration=calibration)
    bundle = add_variants(scratch / "r3d_18", [("aoti", "fp32"), ("onnx", "int8")], options)
    names = [held.id for held in bundle.manifest.variants if held.runtime != "torch"]
    report = verify_bundle(bundle.path, data=data.test, variants=names)
    bundle = keep_records(bundle.path, report.variants)
    rates: dict[str, list[float]] = {name: [] for name in ("obvious", *names)}
    for turn in range(ROUNDS):
        rates["obvious"].append(obvious_rate(checkpoint, [item.path for item in data.test.items], PLAN))
        for name in names:
            rates[name].append(_score_rate(bundle.path, name, data.test, scratch / f"{name}-{turn}"))
    seconds = {name: sum(1.0 / rate for rate in found) / ROUNDS for name, found in rates.items()}
    passed = [name for name in names if bundle.variant(name).verified]
    over = {name: seconds["obvious"] / seconds[name] for name in names}
    return {
        "over_reference_pipeline": max((over[name] for name in passed), default=None),
        "reference_pipeline": {
            "network": checkpoint.stem,
            "videos": len(data.test.items),
            "clips_per_video": PLAN.num_clips,
            "videos_per_s": {name: 1.0 / value for name, value in seconds.items()},
            "over": over,
            "verified": passed,
            "agreement": {name: _agreement(bundle.variant(name)) for name in names},
        },
    }


def _agreement(variant: Variant) -> float | None:
    return variant.verification.figures.get("agreement") if variant.verification else None


def _score_rate(bundle: Path, variant: str, videos: VideoList, out: Path) -> float:
    with open_predictor(
        Task(
            artifact=bundle,
            variant=variant,
            decode=DecodeOptions(workers=decode_workers()),
            num_clips=PLAN.num_clips,
        )
    ) as engine:
        engine.predictor.load(videos.items[0].source)  # starts the decode workers
        summary = score_with(engine, InputStream(videos, Selection()), out)
    if summary.failed:
        raise RuntimeError(f"{summary.failed} videos failed: the rate would be of others")
    return summary.scored / summary.seconds


def obvious_rate(checkpoint: Path, videos: Sequence[Path], plan: ViewPlan) -> float:
    """Return videos per second, one after the other, the loading of the network left out.

    Args:
        checkpoint: Weights, contract and labels.
        videos: Good ones.
        plan: Its ``num_clips`` are taken evenly over the video.
    """
    found = load_checkpoint(checkpoint)
    model, info = found.model.eval(), found.info
    started = time.perf_counter()
    with torch.inference_mode():
        for path in videos:
            clips = _clips(_decode(path), info.clip, plan.num_clips)
            model(clips)["logits"].softmax(dim=1).mean(dim=0).topk(min(5, len(info.labels)))
    return len(videos) / (time.perf_counter() - started)


def _decode(path: Path) -> torch.Tensor:
    """Return all frames, uint8 (T, 3, H, W)."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.stack([torch.from_numpy(frame) for frame in frames]).permute(0, 3, 1, 2)


def _clips(frames: torch.Tensor, clip: ClipSpec, num_clips: int) -> torch.Tensor:
    """Return uint8 (N, T, H, W, 3): resized and cropped by torchvision; the network normalises."""
    from torchvision.transforms import v2

    prepare = v2.Compose([v2.Resize(clip.short_side, antialias=True), v2.CenterCrop(clip.crop_size)])
    ready: torch.Tensor = prepare(frames)
    span = (clip.num_frames - 1) * clip.frame_stride + 1
    starts = torch.linspace(0, max(0, len(ready) - span), num_clips).long()
    steps = torch.arange(clip.num_frames) * clip.frame_stride
    places = (starts[:, None] + steps).clamp(max=len(ready) - 1)
    return ready[places].permute(0, 1, 3, 4, 2).contiguous()
