"""Videos, files and disks that do not do what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from full_disk import run_on_full_disk
from hostile_sources import EatsMemory, Hangs, KillsItsProcess, Surprises, with_hostile
from score_tables import ONE_CLIP

from ivdr_deploy._files import sha256_file
from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.decoding import pool
from ivdr_deploy.errors import ClosedError, DataError, FolderError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring import ScoreOptions, inputs, read_scores, score
from ivdr_deploy.video import VideoLimits


def test_a_defect_stops_the_run(predictor, videos, tmp_path):
    predictor.model.runtime.close()

    with pytest.raises(ClosedError, match="closed"):
        score(predictor, videos, tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize(
    ("hostile", "code"),
    [
        (KillsItsProcess(), "crashed"),
        (Hangs(), "too_slow"),
        (EatsMemory(), "too_large"),
        (Surprises(), "crashed"),
    ],
    ids=["killed", "hangs", "memory", "unexpected error"],
)
def test_a_video_that_breaks_its_worker_is_one_row(checkpoint, videos, tmp_path, monkeypatch, hostile, code):
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.2)
    listed = with_hostile(videos, 2, hostile)
    model = open_model(checkpoint)
    with model.runtime, VideoPredictor(model, limits=VideoLimits(max_decode_seconds=1.0)) as predictor:
        score(predictor, listed, tmp_path / "out")

    codes = [row["error_code"] for row in read_scores(tmp_path / "out").to_pylist()]
    assert codes == [None, None, code, None, "unreadable"]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(36, "File name too long")]
)
def test_a_file_whose_digest_cannot_be_made_is_a_row(predictor, videos, tmp_path, monkeypatch, error):
    def refuse(path):
        if path == videos.items[1].path:
            raise error
        return sha256_file(path)

    monkeypatch.setattr(inputs, "sha256_file", refuse)
    options = ScoreOptions(hash_files=True)

    score(predictor, videos, tmp_path / "out", options=options)

    rows = read_scores(tmp_path / "out").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "error", "error", "ok", "error"]
    assert (rows[1]["error_code"], rows[1]["sha256"], rows[1]["labels"]) == ("unreadable", None, None)
    assert error.strerror in rows[1]["error_message"]
    assert score(predictor, videos, tmp_path / "out", options=options).scored == 0


def test_numbers_that_are_not_finite_are_a_failure_of_the_network(predictor, videos, tmp_path, monkeypatch):
    infer, calls = predictor.model.runtime.infer, []

    def broken(video):
        outputs = infer(video)
        calls.append(len(video))
        outputs["inter"][0] = np.nan  # of the first clip of the first video of a call
        return outputs

    monkeypatch.setattr(predictor._batcher, "_infer", broken)

    summary = score(predictor, videos, tmp_path / "out", options=ONE_CLIP)

    rows = read_scores(tmp_path / "out").to_pylist()
    assert rows[0]["error_code"] == "inference_failed"
    assert "NaN or infinity in inter" in rows[0]["error_message"]
    assert rows[0]["labels"] is None
    assert summary.errors["inference_failed"] == len(calls)
    assert rows[1]["status"] == "ok"


def test_every_awkward_file_is_one_row(predictor, shared_data, tmp_path):
    files = sorted(path for path in (shared_data / "odd").iterdir() if path.suffix not in (".md", ".csv"))
    (tmp_path / "list.csv").write_text("\n".join(["path", *map(str, files)]))

    score(
        predictor,
        read_video_list(tmp_path / "list.csv"),
        tmp_path / "out",
        options=ONE_CLIP,
    )

    rows = {Path(row["uri"]).name: row for row in read_scores(tmp_path / "out").to_pylist()}
    assert list(rows) == [path.name for path in files]
    for name in ("empty.mp4", "text_named.mp4", "audio_only.mp3", "audio_only.m4a", "audio_only.wav"):
        assert rows[name]["status"] == "error"
        assert rows[name]["error_code"] in ("unreadable", "no_video_stream")
    for name in ("metadata_not_utf8.avi", "rotated_90.mov", "variable_frame_rate.mp4", "one_frame.avi"):
        assert (rows[name]["status"], len(rows[name]["labels"])) == ("ok", 5)


def test_a_run_whose_disk_fills_up_ends_with_the_folder_and_completes_when_there_is_room(
    tiny_bundle, listed, tmp_path
):
    out = tmp_path / "out"
    code, said = run_on_full_disk(
        f"run({str(tiny_bundle)!r}, {str(listed)!r}, {str(out)!r})",
        limit=3000,
        before="""
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring import score

def run(bundle, videos, out):
    model = open_model(bundle, variant="onnx-fp32")
    decode = DecodeOptions(isolation="thread")
    def full_after_two(done, total):
        if done == 4:
            fill()
    with model.runtime, VideoPredictor(model, decode=decode) as predictor:
        score(predictor, read_video_list(videos), out, videos_per_shard=2, progress=full_after_two)
""",
    )

    assert (code, said) == (9, f"ivdr: {out}: File too large")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert len(kept) == 1
    with pytest.raises(SystemExit) as caught:
        main(["score", str(tiny_bundle), str(listed), "-o", str(out), "--variant", "onnx-fp32"])
    assert caught.value.code == 1
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}.items()
    assert read_scores(out).num_rows == 5


def test_a_folder_that_is_moved_while_it_is_written_to_is_noticed(predictor, videos, tmp_path):
    def move(done: int, total: int | None) -> None:
        if done == 3:
            (tmp_path / "out").rename(tmp_path / "moved")

    with pytest.raises(FolderError, match="out was moved or removed while scores were written to it"):
        score(predictor, videos, tmp_path / "out", videos_per_shard=2, progress=move)

    assert not (tmp_path / "out").exists(), "no second table was begun"
    assert score(predictor, videos, tmp_path / "moved", videos_per_shard=2).scored == 3
    assert read_scores(tmp_path / "moved").num_rows == 5


def test_a_shard_that_is_removed_while_the_run_goes_on_is_no_complete_table(predictor, videos, tmp_path):
    def remove(done: int, total: int | None) -> None:
        if done == 3:
            next((tmp_path / "out").glob("part-*")).unlink()

    with pytest.raises(DataError, match="lacks 2 of 5 rows"):
        score(predictor, videos, tmp_path / "out", videos_per_shard=2, progress=remove)
    assert score(predictor, videos, tmp_path / "out", videos_per_shard=2).scored == 2


def test_names_that_are_spelled_alike_have_a_row_each(predictor, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.mp4\ncaf\\xe9.mp4\n")

    score(predictor, read_video_list(tmp_path / "list.txt"), tmp_path / "out")

    assert read_scores(tmp_path / "out")["uri"].to_pylist() == [r"caf\xe9.mp4"] * 2
