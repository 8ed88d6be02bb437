from __future__ import annotations

import hashlib
import os
from importlib import metadata

import numpy as np
import pytest
from bundles import TINY_LABELS, make_tiny_checkpoint
from score_tables import ONE_CLIP
from videos import numbered_video

from ivdr_deploy import __version__
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import ConfigError, FolderError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring import ScoreOptions, read_scores, score
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.stage import InProcess, score_groups
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.reader import VideoLimits

VECTORS = ("feature", "inter", "intra")


def test_every_input_is_one_row_and_a_bad_video_has_its_reason(predictor, videos, tmp_path):
    summary = score(predictor, videos, tmp_path / "out")

    rows = read_scores(tmp_path / "out").to_pylist()
    assert [row["uri"] for row in rows] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4"]
    assert [row["label"] for row in rows] == ["sit", "turn", None, "bow", None]
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "ok", "error"]
    assert rows[2]["error_code"] == "unreadable"
    assert rows[4]["error_message"]
    for row in (rows[2], rows[4]):
        assert row["labels"] is None
        assert row["num_frames"] is None
    assert rows[1]["num_frames"] == 20
    assert rows[1]["duration_seconds"] == pytest.approx(0.8)
    assert len({row["video_id"] for row in rows}) == 5
    assert {row["run_id"] for row in rows} == {summary.run_id}
    assert {row["contract_hash"] for row in rows} == {predictor.model.contract_hash}
    assert (summary.videos, summary.scored, summary.ok, summary.failed) == (5, 5, 3, 2)
    assert sum(summary.errors.values()) == 2


def test_rows_hold_what_the_predictor_answers(predictor, videos, tmp_path):
    options = ScoreOptions(top_k=3, outputs=VECTORS)

    score(predictor, videos, tmp_path / "out", options=options)

    row = read_scores(tmp_path / "out").to_pylist()[1]
    result = predictor.predict(videos.items[1].path)
    top = result.top(3)
    assert row["labels"] == [label for label, _ in top]
    np.testing.assert_allclose(row["scores"], [value for _, value in top], atol=1e-6)  # it shared a call
    for name in VECTORS:
        np.testing.assert_allclose(row[name], getattr(result, name), atol=1e-5)
    assert np.shape(row["intra"]) == (2, 2, 8)


def test_number_of_clips_and_labels_can_be_chosen(predictor, videos, tmp_path):
    options = ScoreOptions(top_k=50, outputs=("intra",), view_plan=ViewPlan(num_clips=3))

    score(predictor, videos, tmp_path / "out", options=options)

    row = read_scores(tmp_path / "out").to_pylist()[0]
    assert sorted(row["labels"]) == sorted(TINY_LABELS)
    assert len(row["intra"]) == 3


def test_files_are_hashed_on_request_even_when_they_are_no_videos(predictor, videos, tmp_path):
    score(predictor, videos, tmp_path / "out", options=ScoreOptions(hash_files=True))

    digests = read_scores(tmp_path / "out")["sha256"].to_pylist()
    assert digests[2] == hashlib.sha256(videos.items[2].path.read_bytes()).hexdigest()
    assert digests[4] is None
    assert None not in digests[:4]


def test_another_model_is_another_run(predictor, videos, tmp_path):
    score(predictor, videos, tmp_path / "out")
    model = open_model(make_tiny_checkpoint(tmp_path / "tiny.safetensors", seed=1))

    with (
        model.runtime,
        VideoPredictor(model) as other,
        pytest.raises(FolderError, match=r"another run.*model_sha256"),
    ):
        score(other, videos, tmp_path / "out")


def test_options_that_cannot_work_leave_no_folder(predictor, videos, tmp_path):
    with pytest.raises(ConfigError, match="videos_per_shard must be at least 1"):
        score(predictor, videos, tmp_path / "out", videos_per_shard=0)
    assert not (tmp_path / "out").exists()


def test_a_file_name_that_is_not_text_is_spelled_out(predictor, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    numbered_video(folder / "a.mp4", num_frames=4, size=(64, 48))
    os.rename(folder / "a.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")

    score(predictor, read_video_list(folder), tmp_path / "out")

    (row,) = read_scores(tmp_path / "out").to_pylist()
    assert (row["uri"], row["status"]) == (r"caf\xe9.mp4", "ok")


def test_the_network_takes_up_a_shard_when_the_one_before_was_taken(
    predictor: VideoPredictor, videos: VideoList, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    infer = predictor._batcher.submit_together

    def watched(pixels: list[np.ndarray]) -> object:
        calls.append(len(pixels))
        return infer(pixels)

    monkeypatch.setattr(predictor._batcher, "submit_together", watched)
    engine = InProcess(predictor, ONE_CLIP)
    good = [item for item in InputStream(videos, Selection()) if item.uri in {"0.mp4", "1.mp4", "3.mp4"}]
    groups = [(item.uri, (item,)) for item in good]
    rows = score_groups(predictor, groups, engine.plan)

    first = next(rows)
    predictor.load(good[0].source)  # the one worker takes them in order: all are decoded
    assert calls == [1], "while the first shard is being committed, the network is at the second"
    rest = [*rows]

    assert calls == [1, 1, 1]
    assert [row[3] for row in (first, *rest)] == [True, True, True], "each is the last of its group"


def test_the_plan_of_a_run_is_that_of_its_model_and_its_options(checkpoint):
    model = open_model(checkpoint)
    limits = VideoLimits(max_decode_seconds=7.0)
    options = ScoreOptions(top_k=2, outputs=("inter", "inter"), hash_files=True)
    with model.runtime, VideoPredictor(model, limits=limits, decoder="opencv") as predictor:
        plan = InProcess(predictor, options, share="1/2").plan

    assert (
        plan.differences(
            RunPlan(
                ivdr_version=__version__,
                model=model.name,
                model_version=model.version,
                model_sha256=model.sha256,
                variant=model.variant,
                runtime=model.runtime.description,
                contract_hash=model.contract_hash,
                view_plan=model.view_plan,
                top_k=2,
                outputs=("inter",),
                hash_files=True,
                decoder="opencv",
                limits=to_dict(limits),
                software={"opencv-python-headless": metadata.version("opencv-python-headless")},
                share="1/2",
            )
        )
        == {}
    )
    assert limits.max_decode_seconds == plan.limits["max_decode_seconds"]
    assert all((plan.model, plan.model_sha256, plan.variant, plan.runtime, plan.contract_hash))
