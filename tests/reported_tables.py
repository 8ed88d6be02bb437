"""A small score table to report on: a row for each label, with scores, features and times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import run_plans

from ivdr_deploy.cli import main
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.scoring.index import Index
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.shard import make_shard
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table

PLAN = replace(run_plans.PLAN, model="<b>tiny", outputs=("feature",))
LABELS = ["sit", "sit", "turn", None, "sit", None]
SCORES = [0.95, 0.81, 0.55, None, 0.3, None]


def write(
    folder: Path,
    *,
    plan: RunPlan = PLAN,
    labels: list[str | None] = LABELS,
    scores: list[float | None] = SCORES,
    features: np.ndarray | None = None,
    whole: bool = True,
    key: str = "k",
    left_out: tuple[LeftOut, ...] = (),
    uri: str = "v",
) -> Path:
    """A table of one row for each label; those without one failed."""
    count = len(labels)
    inputs = [
        Input(i, f"{uri}{i}.mp4", "sit" if i < 3 else None, f"id{i}", f"{key}{i}", f"/v{i}.mp4")
        for i in range(count)
    ]
    vectors = np.zeros((count, 2)) if features is None else features
    rows = []
    for item, label, score, vector in zip(inputs, labels, scores, vectors, strict=True):
        row = {"input_key": item.key, "video_id": item.video_id, "uri": item.uri, "label": item.label}
        row |= {"model": plan.model, "model_version": "1.0", "variant": plan.variant}
        row |= {"contract_hash": "cc", "view_plan": "1 clip", "run_id": plan.run_id}
        if label is None:
            code = "unreadable" if item.position == 3 else "crashed"
            row |= {"status": "error", "error_code": code, "error_message": f"<script>{item.uri}"}
        else:
            row |= {"status": "ok", "labels": [label, "bow"], "scores": [score, 0.01], "feature": [*vector]}
            row |= {"num_frames": 10, "duration_seconds": 2.0, "decode_ms": 10.0 * item.position}
            row |= {"preprocess_ms": 1.0, "infer_ms": 5.0}
        rows.append(row)
    index = Index()
    index.add(inputs)
    index.left_out = left_out
    with open_table(FolderStore(folder), plan, manifest={}) as table:
        if inputs:
            table.write(make_shard(plan.run_id, inputs), rows)
        if whole:
            table.write_index(index, partial=False)
    return folder


def main_exits(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    assert (caught.value.code or 0) == code
