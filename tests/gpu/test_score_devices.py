"""Scoring on GPUs: an engine on each, and several on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from videos import numbered_video

from ivdr_deploy.cli import main
from ivdr_deploy.scoring import read_scores

pytestmark = pytest.mark.gpu

VARIANT = ("--variant", "torch-fp32")
TIMINGS = ["decode_ms", "preprocess_ms", "infer_ms"]


def test_engines_on_one_gpu_or_on_all_give_the_rows_of_one(tiny_bundle: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for index in range(70):  # three shards
        numbered_video(videos / f"{index:02d}.mp4", num_frames=8 + index % 5, size=(64, 48))
    every = ",".join(map(str, range(torch.cuda.device_count())))

    tables = []
    for devices in ("0", "0,0", every):
        out = tmp_path / f"out-{devices}-{len(tables)}"
        with pytest.raises(SystemExit) as ended:
            main(["score", str(tiny_bundle), str(videos), "-o", str(out), *VARIANT, "--devices", devices])
        assert not ended.value.code
        tables.append(read_scores(out).drop_columns(TIMINGS))

    assert all(table.equals(tables[0]) for table in tables)
