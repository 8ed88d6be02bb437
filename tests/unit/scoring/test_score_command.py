"""``ivdr score`` as it is typed."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from videos import numbered_video

from ivdr_deploy.cli import main
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.scoring.shard import METADATA_KEY


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


def run(capsys, *words: str, code: int = 0) -> str:
    """Score in this process; returns what was said on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(["score", *words, "--isolation", "thread", "--variant", "onnx-fp32"])
    said = capsys.readouterr().err
    assert (caught.value.code or 0) == code, said
    return said


def test_failures_outside_of_a_part_of_the_list_keep_their_rows(tiny_bundle, listed, tmp_path, capsys):
    words = [str(tiny_bundle), str(listed), "-o", str(tmp_path / "out")]
    run(capsys, *words, code=1)
    before = read_scores(tmp_path / "out")["status"].to_pylist()

    said = run(capsys, *words, "--retry-failed", "--limit", "3", code=1)

    assert "scored 1 of 5" in said
    assert sorted(read_scores(tmp_path / "out")["status"].to_pylist()) == sorted(before)


def test_a_part_without_a_video_is_not_called_complete(tiny_bundle, listed, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = [str(tiny_bundle), str(listed), "-o", out]
    said = run(capsys, *words, "--since", "2090-01-01")
    assert "nothing to do: no video of this part of the list is without a row" in said
    assert "not changed since 2090" in said
    with pytest.raises(SystemExit) as caught:
        main(["scores", out])
    printed = capsys.readouterr().out
    assert not caught.value.code
    assert (
        "left out    4 not changed since 2090-01-01 00:00:00+00:00: 0.mp4, 1.mp4, 2.mp4 and 1 more" in printed
    )
    assert "1 without a time of change: 4.mp4" in printed

    few = listed.parent / "few.csv"
    few.write_text("path\n0.mp4\n")
    shares = [run(capsys, str(tiny_bundle), str(few), "-o", f"{out}{i}", "--shard", f"{i}/2") for i in (1, 2)]
    assert sum("nothing to do: no video of the list is in this share" in said for said in shares) == 1
    assert {read_scores(f"{out}{i}").num_rows for i in (1, 2)} == {0, 1}


def test_a_folder_that_cannot_be_read_costs_no_row_and_is_an_exit_code(
    tiny_bundle, tmp_path, capsys, monkeypatch
):
    for name in ("a/1.mp4", "b/2.mp4", "c/3.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True)
        numbered_video(tmp_path / "videos" / name, num_frames=4, size=(64, 48))
    words = [str(tiny_bundle), str(tmp_path / "videos"), "-o", str(tmp_path / "out")]
    run(capsys, *words)
    shutil.rmtree(tmp_path / "videos" / "c")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("videos/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        said = run(capsys, *words, code=1)
    assert "left out: 1 folders that cannot be read (Permission denied): b" in said
    assert "the table is complete" not in said
    with pytest.raises(SystemExit):
        main(["scores", str(tmp_path / "out"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["left_out"][0]["unread"] is True
    assert told["state"] == "not whole: 3 rows, and a folder of the list could not be read"
    assert read_scores(tmp_path / "out")["uri"].to_pylist() == ["a/1.mp4", "b/2.mp4", "c/3.mp4"]

    assert "dropped 1 rows" in run(capsys, *words)
    assert read_scores(tmp_path / "out")["uri"].to_pylist() == ["a/1.mp4", "b/2.mp4"]


def test_a_root_for_a_place_in_a_store_is_refused(tiny_bundle, tmp_path, capsys):
    said = run(capsys, str(tiny_bundle), "s3://bucket/x", "-o", str(tmp_path / "o"), "--root", "/", code=2)
    assert "'s3://bucket/x' is a place of videos; the root / is for list files" in said
    said = run(capsys, str(tiny_bundle), "https://host/list.csv", "-o", str(tmp_path / "o"), code=2)
    assert "'https://host/list.csv' is a place of the web, from which no list is fetched" in said
