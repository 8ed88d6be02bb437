"""A small score table, made without a model: five inputs, of which every second failed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import run_plans

from ivdr_deploy.scoring.index import Index
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.plan import RunPlan, ScoreOptions
from ivdr_deploy.scoring.reader import read_scores
from ivdr_deploy.scoring.shard import Shard, make_shard
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table
from ivdr_deploy.spec import ViewPlan

PLAN = replace(run_plans.PLAN, view_plan=ViewPlan(num_clips=1), outputs=("feature", "intra"))
MANIFEST = {"name": "tiny", "labels": ["sit", "stand"]}
ONE_CLIP = ScoreOptions(view_plan=ViewPlan(num_clips=1))
TIMINGS = ["decode_ms", "preprocess_ms", "infer_ms"]
"""Columns that no two runs have alike."""

INPUTS = tuple(
    Input(position, f"{position}.mp4", None, f"id{position}", f"key{position}", f"/{position}.mp4")
    for position in range(5)
)


def row(position: int) -> dict[str, object]:
    """Odd positions failed."""
    base = {
        "input_key": f"key{position}",
        "video_id": f"id{position}",
        "uri": f"{position}.mp4",
        "model": "tiny",
        "model_version": "1.0",
        "variant": "onnx-fp32",
        "contract_hash": "cc",
        "view_plan": "1 clip, centre crop",
        "run_id": PLAN.run_id,
    }
    if position % 2:
        return base | {"status": "error", "error_code": "unreadable", "error_message": "no"}
    vectors = {"feature": [0.5, float(position)], "intra": [[[1.0, 0.0], [0.0, 1.0]]]}
    return base | vectors | {"status": "ok", "labels": ["sit", "stand"], "scores": [0.75, 0.25]}


def shards(inputs: tuple[Input, ...] = INPUTS, plan: RunPlan = PLAN, size: int = 2) -> list[Shard]:
    return [make_shard(plan.run_id, inputs[start : start + size]) for start in range(0, len(inputs), size)]


SHARDS = shards()


def index_of(inputs: tuple[Input, ...]) -> Index:
    index = Index()
    index.add(inputs)
    return index


def write(
    folder: Path, *, plan: RunPlan = PLAN, count: int | None = None, inputs: tuple[Input, ...] = INPUTS
) -> int:
    """Score what is absent of some inputs, the first ``count`` shards of it; all by default, with the index."""
    with open_table(FolderStore(folder), plan, manifest=MANIFEST) as table:
        absent = tuple(item for item in inputs if item.key not in table.done)
        for shard in shards(absent, plan)[:count]:
            table.write(shard, [row(int(item.video_id[2:])) | {"label": item.label} for item in shard.inputs])
        if count is None:
            table.write_index(index_of(inputs), partial=False)
            table.settle(len(inputs))
    return len(absent)


def keys(folder: Path) -> list[str]:
    return read_scores(folder)["input_key"].to_pylist()


def plain_keys(folder: Path) -> list[str]:
    """What a common reader finds."""
    return sorted(pq.read_table(folder, columns=["input_key"])["input_key"].to_pylist())


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
