"""Runs that go on, over a list that is as it was or has changed."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from score_tables import TIMINGS
from videos import numbered_video

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.scoring import ScoreOptions, read_scores, score
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.scorer import RETRIED, score_with
from ivdr_deploy.scoring.stage import InProcess
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import ScoreTable


def test_a_second_run_over_a_finished_folder_does_nothing(predictor, videos, tmp_path):
    first = score(predictor, videos, tmp_path / "out")
    before = read_scores(tmp_path / "out")

    second = score(predictor, videos, tmp_path / "out")

    assert second.scored == 0
    assert (second.ok, second.failed, second.errors) == (first.ok, first.failed, first.errors)
    assert read_scores(tmp_path / "out").equals(before)


def test_an_interrupted_run_keeps_its_shards_and_goes_on_to_the_same_table(predictor, videos, tmp_path):
    score(predictor, videos, tmp_path / "whole", videos_per_shard=2)

    def stop_at_the_fourth(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(predictor, videos, tmp_path / "out", videos_per_shard=2, progress=stop_at_the_fourth)
    assert len(list((tmp_path / "out").glob("part-*"))) == 1
    summary = score(predictor, videos, tmp_path / "out", videos_per_shard=2)

    assert summary.scored == 3
    resumed, whole = read_scores(tmp_path / "out"), read_scores(tmp_path / "whole")
    assert resumed.drop_columns(TIMINGS).equals(whole.drop_columns(TIMINGS))


def test_a_lost_shard_is_computed_again_and_nothing_else(predictor, videos, tmp_path):
    score(predictor, videos, tmp_path / "out", videos_per_shard=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    sorted((tmp_path / "out").glob("part-*"))[1].unlink()

    assert score(predictor, videos, tmp_path / "out", videos_per_shard=2).scored == 2

    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert before.keys() == after.keys()
    assert len(before.items() & after.items()) == 2
    assert read_scores(tmp_path / "out").num_rows == 5


def same_rows(one, other) -> None:
    """Rows of equal inputs, the numbers to the last digits: what else is in a call of the network moves those."""
    one, other = (table.drop_columns([*TIMINGS, "scores"]).to_pylist() for table in (one, other))
    assert one == other


@pytest.mark.parametrize(
    "change", ["grown", "shrunk", "reversed", "replaced", "appeared", "relabelled", "all"]
)
def test_a_changed_list_gives_the_rows_of_a_fresh_run_and_scores_only_what_changed(
    predictor, listed, tmp_path, change
):
    folder, lines = listed.parent, listed.read_text().splitlines()[1:]
    before = lines[:3] if change in ("grown", "all") else lines
    listed.write_text("\n".join(["path,label", *before]))
    score(predictor, read_video_list(listed), tmp_path / "out", videos_per_shard=2)
    expected = {"grown": 2, "replaced": 1, "appeared": 1, "all": 4}.get(change, 0)
    if change in ("shrunk", "all"):
        lines = lines[:1] + lines[2:]
    if change in ("reversed", "all"):
        lines = lines[::-1]
    if change in ("replaced", "all"):
        numbered_video(folder / "0.mp4", num_frames=15, size=(64, 48))
    if change in ("appeared", "all"):
        numbered_video(folder / "4.mp4", num_frames=7, size=(64, 48))
    if change in ("relabelled", "all"):
        lines = [line.replace("bow", "nod") for line in lines]
        (folder / "2.mp4").touch()
        expected += change == "relabelled"
    listed.write_text("\n".join(["path,label", *lines]))
    videos = read_video_list(listed)

    summary = score(predictor, videos, tmp_path / "out", videos_per_shard=2)
    score(predictor, videos, tmp_path / "fresh", videos_per_shard=2)

    table, fresh = read_scores(tmp_path / "out"), read_scores(tmp_path / "fresh")
    same_rows(table, fresh)
    for ours, theirs in zip(table["scores"].to_pylist(), fresh["scores"].to_pylist(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert summary.scored == expected
    assert pq.read_table(tmp_path / "out").num_rows == len(lines)
    assert score(predictor, videos, tmp_path / "out").scored == 0


def test_with_digests_a_file_replaced_by_one_of_the_same_size_and_time_is_scored_again(
    predictor, videos, tmp_path
):
    options = ScoreOptions(hash_files=True)
    score(predictor, videos, tmp_path / "out", options=options)
    assert score(predictor, videos, tmp_path / "out", options=options).scored == 0
    path = videos.items[1].path
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=times)

    summary = score(predictor, videos, tmp_path / "out", options=options)

    assert (summary.scored, summary.dropped) == (1, 1)
    row = read_scores(tmp_path / "out").to_pylist()[1]
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert row["status"] == "error"


class Committing(InProcess):
    """Takes all shards at once and commits them itself, as the actors of a cluster do."""

    out: Path

    def run(self, shards, *, journal, scored):
        table = ScoreTable(FolderStore(self.out), self.plan, manifest=self.manifest)
        for shard, rows in super().run(iter([*shards]), journal=journal, scored=scored):
            table.write(shard, rows)
            yield shard, None


def test_an_engine_that_has_taken_all_shards_is_stopped_too(predictor, videos, tmp_path):
    engine = Committing(predictor, ScoreOptions())
    engine.out = tmp_path / "out"

    def run(stopping):
        inputs = InputStream(videos, Selection())
        return score_with(engine, inputs, engine.out, videos_per_shard=2, stopping=stopping)

    first = run(lambda: any(engine.out.glob("part-*")))

    assert first.stopped
    assert 0 < first.scored < 5
    second = run(lambda: False)
    assert (second.stopped, second.scored) == (False, 5 - first.scored)
    assert read_scores(engine.out).num_rows == 5


def test_a_failed_row_is_gone_while_its_input_is_scored_again(predictor, videos, tmp_path, monkeypatch):
    infer = predictor.model.runtime.infer

    def broken(video):
        outputs = infer(video)
        outputs["inter"][0] = np.nan  # of the first video of a call
        return outputs

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(predictor._batcher, "_infer", broken)
        assert score(predictor, videos, out).errors["inference_failed"] > 0

    def watch(done, total):
        there = pq.read_table(out, columns=["error_code"])["error_code"].to_pylist()
        assert "inference_failed" not in there

    engine = InProcess(predictor, ScoreOptions())
    inputs = InputStream(videos, Selection())
    summary = score_with(engine, inputs, out, retry=["inference_failed"], progress=watch)

    assert (summary.errors, summary.dropped) == ({"unreadable": 2}, 0)
    assert summary.scored > 0
    assert read_scores(out)["status"].to_pylist() == ["ok", "ok", "error", "ok", "error"]


class Journaling(InProcess):
    """Notes what it begins, as a process that is watched does."""

    def run(self, shards, *, journal, scored):
        for shard, rows in super().run(shards, journal=journal, scored=scored):
            journal.begin(shard)
            yield shard, rows


def test_what_is_known_of_a_shard_is_forgotten_when_it_is_there_and_not_before(
    predictor, videos, tmp_path, monkeypatch
):
    engine, out = Journaling(predictor, ScoreOptions()), tmp_path / "out"

    def refuse(self, shard, rows):
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr(ScoreTable, "write", refuse)
        with pytest.raises(OSError, match="No space left"):
            score_with(engine, InputStream(videos, Selection()), out)
    assert len(list(out.glob("_attempt-*"))) == 1
    score_with(engine, InputStream(videos, Selection()), out)
    assert not list(out.glob("_attempt-*"))


def test_what_can_be_another_time_is_scored_again():
    assert set(RETRIED) == {"too_slow", "crashed", "unreadable"}
