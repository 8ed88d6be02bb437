from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bundles import TINY_LABELS, make_tiny_checkpoint
from full_disk import run_on_full_disk
from hostile_sources import EatsMemory, Hangs, KillsItsProcess, Surprises, with_hostile
from videos import numbered_video

from ivdr_deploy._files import sha256_file
from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions, pool
from ivdr_deploy.errors import ClosedError, ConfigError, FolderError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring import ScoreOptions, inputs, read_scores, score
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.shard import METADATA_KEY
from ivdr_deploy.scoring.stage import InProcess, score_groups
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video import VideoLimits

TIMINGS = ["decode_ms", "preprocess_ms", "infer_ms"]
ONE_CLIP = ScoreOptions(view_plan=ViewPlan(num_clips=1))
VECTORS = ("feature", "inter", "intra")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture
def predictor(checkpoint: Path) -> Iterator[VideoPredictor]:
    model = open_model(checkpoint)
    with (
        model.runtime,
        VideoPredictor(model, decode=DecodeOptions(isolation="thread")) as predictor,
    ):
        yield predictor


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Five inputs: 0, 1 and 3 are videos, 2 is garbage, 4 is absent."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for index, num_frames in ((0, 12), (1, 20), (3, 1)):
        numbered_video(folder / f"{index}.mp4", num_frames=num_frames, size=(64, 48))
    (folder / "2.mp4").write_bytes(b"not a video at all" * 10)
    lines = [
        "path,label",
        *(f"{index}.mp4,{label}" for index, label in enumerate(["sit", "turn", "", "bow", ""])),
    ]
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


@pytest.fixture
def videos(listed: Path) -> VideoList:
    return read_video_list(listed)


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


def test_the_command_scores_a_bundle_and_says_that_some_failed(tiny_bundle, listed, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["score", str(tiny_bundle), str(listed), "-o", str(out), "--output", "inter", "--json"]

    with pytest.raises(SystemExit) as caught:
        main(arguments)

    summary = json.loads(capsys.readouterr().out)
    assert caught.value.code == 1
    assert (summary["videos"], summary["ok"], summary["failed"], summary["scored"]) == (5, 3, 2, 5)
    facts = json.loads(read_scores(out).schema.metadata[METADATA_KEY])
    assert facts["manifest"] == {
        key: value
        for key, value in json.loads((tiny_bundle / "manifest.json").read_text()).items()
        if key != "manifest_sha256"
    }
    assert facts["plan"]["variant"] == "onnx-fp32"
    assert facts["plan"]["view_plan"]["num_clips"] == 2
    with pytest.raises(SystemExit):
        main([argument for argument in arguments if argument != "--json"])
    assert "nothing to do: the table is complete" in capsys.readouterr().err


def test_the_command_ends_well_when_no_video_failed(tiny_bundle, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    numbered_video(tmp_path / "videos" / "a.mp4", num_frames=4, size=(64, 48))

    with pytest.raises(SystemExit) as caught:
        main(["score", str(tiny_bundle), str(tmp_path / "videos"), "-o", str(tmp_path / "out")])

    assert not caught.value.code
    assert "scored 1 of 1" in capsys.readouterr().err


def test_the_command_refuses_the_folder_of_another_run(tiny_bundle, listed, tmp_path, capsys):
    arguments = ["score", str(tiny_bundle), str(listed), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(arguments)

    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--top-k", "2"])

    assert caught.value.code == 10
    assert "another run (top_k: 5, not 2)" in capsys.readouterr().err


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


def test_parts_of_a_list_and_failures_are_scored_as_the_command_is_told(
    tiny_bundle, listed, tmp_path, capsys
):
    def run(out: str, *words: str, code: int = 1) -> dict:
        arguments = [
            "score",
            str(tiny_bundle),
            str(listed),
            "-o",
            str(tmp_path / out),
            "--isolation",
            "thread",
        ]
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--variant", "onnx-fp32", "--json", *words])
        assert (caught.value.code or 0) == code, capsys.readouterr().err
        printed = capsys.readouterr().out
        return json.loads(printed) if printed else {}

    def uris(out: str) -> list[str]:
        return read_scores(tmp_path / out)["uri"].to_pylist()

    few = run("out", "--limit", "2", code=0)
    assert (few["scored"], uris("out")) == (2, ["0.mp4", "1.mp4"])
    assert few["left_out"][0]["reason"] == "behind the limit"
    assert run("out")["scored"] == 3
    assert run("out", "--limit", "1")["scored"] == 0
    assert sorted(uris("out")) == [f"{index}.mp4" for index in range(5)], "rows of other inputs stay"
    again = run("out", "--retry-failed")
    assert (again["scored"], again["errors"]) == (2, {"unreadable": 2})
    assert uris("out") == [f"{index}.mp4" for index in range(5)]
    os.utime(listed.parent / "3.mp4", (2e9, 2e9))
    assert run("late", "--since", "2033-01-01", code=0)["scored"] == 1
    assert uris("late") == ["3.mp4"]

    shares = [run("share1", "--shard", "1/2"), run("share2", "--shard", "2/2", code=0)]
    assert sorted(uris("share1") + uris("share2")) == [f"{index}.mp4" for index in range(5)]
    assert shares[0]["run_id"] != shares[1]["run_id"]
    run("share1", "--shard", "2/2", code=10)


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
