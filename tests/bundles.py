"""Small real checkpoints and bundles with random weights: real files of the real formats, quick to run.

``make_tiny_bundle`` exports through the real exporter, which takes seconds: make one a session.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.artifacts.manifest import (
    MANIFEST_FILE,
    ArtifactManifest,
    file_entry,
    read_manifest,
    write_manifest,
)
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec, TrainingState, ViewPlan

TINY_CLIP = ClipSpec(num_frames=4, frame_stride=2, short_side=36, crop_size=32)
TINY_PLAN = ViewPlan(num_clips=2)
TINY_LABELS = ("bow", "jump", "sit", "stand", "turn", "wave")


def make_tiny_checkpoint(
    path: Path,
    *,
    labels: Sequence[str] = TINY_LABELS,
    clip: ClipSpec = TINY_CLIP,
    plan: ViewPlan = TINY_PLAN,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of ``tiny`` with every head valid; another seed gives other weights."""
    spec = ModelSpec(backbone="tiny", num_slots=2, slot_dim=8, clip_dim=8, num_classes=len(labels))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(spec, clip).eval()
    heads = ("clip_head", "series_head", "classifier")
    info = CheckpointInfo(
        clip=clip,
        view_plan=plan,
        model=spec,
        labels=tuple(labels),
        training=TrainingState(backbone_step=1, head_steps=dict.fromkeys(heads, 1)),
    )
    golden = np.random.default_rng(seed).integers(0, 256, (2, *clip.clip_shape), dtype=np.uint8)
    save_checkpoint(path, model=model, info=info, golden=golden)
    return path


def make_tiny_bundle(
    folder: Path,
    *,
    name: str = "tiny",
    version: str = "1.0",
    labels: Sequence[str] = TINY_LABELS,
    clip: ClipSpec = TINY_CLIP,
    plan: ViewPlan = TINY_PLAN,
    seed: int = 0,
) -> Path:
    """Export ``make_tiny_checkpoint`` into ``folder``, which must not exist; return ``folder``."""
    from ivdr_deploy.export.bundle_export import export_bundle

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_tiny_checkpoint(
            Path(scratch) / "tiny.safetensors", labels=labels, clip=clip, plan=plan, seed=seed
        )
        export_bundle(checkpoint, folder, name=name, version=version)
    return folder


def reseal(folder: Path, **changes: Any) -> Path:
    """Make the manifest of a changed bundle true again, as if it had been exported so.

    Args:
        folder: The bundle; files that are gone leave the manifest.
        **changes: Fields of the manifest to change on the way.

    Returns:
        ``folder``.
    """
    manifest = replace(_manifest(folder), **changes)
    files = tuple(
        file_entry(folder, entry.path, kind=entry.kind)
        for entry in manifest.files
        if (folder / entry.path).exists()
    )
    write_manifest(folder, replace(manifest, files=files))
    return folder


def keep_variants(folder: Path, *ids: str) -> Path:
    """Take all variants but some out of a bundle, with their files. Returns ``folder``."""
    manifest = _manifest(folder)
    kept = tuple(variant for variant in manifest.variants if variant.id in ids)
    gone = {name for variant in manifest.variants if variant.id not in ids for name in variant.files}
    for name in gone:
        (folder / name).unlink()
    files = tuple(entry for entry in manifest.files if entry.path not in gone)
    write_manifest(folder, replace(manifest, variants=kept, files=files))
    return folder


def _manifest(folder: Path) -> ArtifactManifest:
    return read_manifest((folder / MANIFEST_FILE).read_bytes(), where=MANIFEST_FILE)


def spread(model: VideoModel, video: np.ndarray) -> VideoModel:
    """Give batch norm the statistics of ``video``, the classifier large weights; returns it in eval mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.from_numpy(video))
        if model.classifier is not None:
            model.classifier.linear.weight.normal_()
    return model.eval()
