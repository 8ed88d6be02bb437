"""Settings of short real runs, and what they leave."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import torch

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.spec import ClipSpec, ModelSpec, ViewPlan
from train.config import DataConfig, FinetuneConfig, OptimConfig, PretrainConfig

CLIP = ClipSpec(num_frames=4, frame_stride=3, short_side=36, crop_size=32)
PLAN = ViewPlan(num_clips=2)
MODEL = ModelSpec(backbone="tiny", clip_dim=16, slot_dim=8, head_norm="series")
HEADS = ("clip_head", "series_head", "classifier")


def pretrain_config(out: Path, data: DataConfig, **fields: object) -> PretrainConfig:
    optim = OptimConfig(name="adamw", lr=1e-3, epochs=2, batch_size=8, schedule="cosine")
    data = replace(data, test="", validation="")  # has no part in it
    base = PretrainConfig(
        out=str(out), data=data, clip=CLIP, view_plan=PLAN, model=MODEL, optim=optim, log_every=1
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def finetune_config(out: Path, data: DataConfig, **fields: object) -> FinetuneConfig:
    optim = OptimConfig(name="adamw", lr=1e-3, epochs=1, batch_size=8, schedule="cosine")
    base = FinetuneConfig(
        out=str(out), data=data, clip=CLIP, view_plan=PLAN, model=MODEL, optim=optim, log_every=1
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def state(path: Path, part: str) -> dict[str, torch.Tensor]:
    return dict(getattr(load_checkpoint(path).model, part).state_dict())


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def rewrite(source: str, path: Path, **labels: str) -> DataConfig:
    """A training list next to its videos, and a copy of it as test list with some labels changed."""
    rows = list(csv.DictReader(Path(source).read_text().splitlines()))
    lines = [
        f"{Path(source).parent / row['path']},{labels.get(Path(row['path']).stem, row['label'])}"
        for row in rows
    ]
    path.write_text("path,label\n" + "\n".join(lines) + "\n")
    return DataConfig(train=source, test=str(path))
