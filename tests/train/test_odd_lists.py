"""Training and evaluation on lists that are not plain: names, roots, containers, and what is left out."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from runs import finetune_config
from videos import numbered_frame, write_video

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import ConfigError
from train.__main__ import main
from train.config import DataConfig
from train.finetune import finetune
from train.run_page import VALIDATION_NAME
from train.validation import read_rows


def test_class_folders_that_are_not_utf8_train_and_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    for label in (b"d\xe9", b"up"):
        folder = Path(os.fsdecode(os.fsencode(videos) + b"/" + label))
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            frames = (numbered_frame(k, size=(64, 48)) for k in range(24))
            video = write_video(tmp_path / "v.wmv", frames, codec="wmv2", bframes=0)
            video.rename(folder / os.fsdecode(f"{name}".encode() + b"\xe9.wmv"))
    (videos / "readme.txt").write_text("x")
    data = DataConfig(train=str(videos), test=str(videos), allow_containers=("asf",))
    cache = os.fsdecode(os.fsencode(tmp_path) + b"/cache\xe9")
    path = finetune(finetune_config(tmp_path / "run", replace(data, cache=cache)))
    assert capsys.readouterr().err.count("left out: 1 without the suffix of a video: readme.txt") == 2
    info = load_checkpoint(path).info
    assert info.labels == ("d\\xe9", "up")
    assert info.provenance.config["data"]["cache"] == f"{tmp_path}/cache\\xe9"
    with pytest.raises(ConfigError, match=r"out is '.*, which is no text in UTF-8"):
        finetune_config(tmp_path / "run\udce9", data)
    assert main(["evaluate", str(path), "--videos", str(videos), "--allow-container", "asf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["video_accuracy"]["total"] == 4
    assert set(report["per_class"]) == {"d\\xe9", "up"}


def test_official_lists_give_each_part_to_its_use(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(data.train).parent
    videos = sorted(root.rglob("*.mp4"))[:6]
    for label in ("one", "two"):
        lines = "".join(
            f"{video.name} {1 + k % 2}\n"
            for k, video in enumerate(videos)
            if (k // 2) % 2 == (label == "two")
        )
        (tmp_path / f"{label}_test_split1.txt").write_text(lines)
    every = str(tmp_path / "*_test_split1.txt")
    config = finetune_config(
        tmp_path / "run",
        DataConfig(train=every, test=every, validation=every, root=str(videos[0].parent)),
    )
    info = load_checkpoint(finetune(config)).info
    assert info.labels == ("one", "two")
    assert info.provenance.metrics["test_videos"] == 3
    rows = read_rows(tmp_path / "run" / VALIDATION_NAME)
    assert rows[-1].video_accuracy == info.provenance.metrics["video_accuracy"]  # of the same three
    assert "3 training videos, 0 skipped" in capsys.readouterr().err
