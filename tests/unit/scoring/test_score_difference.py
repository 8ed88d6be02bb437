"""What differs between two tables."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from reported_tables import PLAN, SCORES, main_exits, write

from ivdr_deploy.errors import DataError
from ivdr_deploy.scoring.difference import difference
from ivdr_deploy.scoring.report import report


def test_what_differs_between_two_runs_is_named_in_plan_and_rows(tmp_path, capsys):
    one = write(tmp_path / "a")
    plan = replace(PLAN, variant="torch-int8", limits={"max_bytes": 5})
    other = write(
        tmp_path / "b",
        plan=plan,
        labels=["turn", "sit", "turn", "sit", "sit"],
        scores=[0.95, 0.71, 0.55, 0.5, 0.3],
    )

    found = difference(one, other)

    assert found.plan == {"variant": "onnx-fp32, not torch-int8", "limits.max_bytes": "None, not 5"}
    assert found.compared == 5
    assert found.counts == {
        "only in the first": 1, "only in the second": 0, "another file": 0, "outcome": 1, "label": 1, "scores": 1,
        "vectors": 0,
    }  # fmt: skip
    assert found.examples["label"] == ("v0.mp4",)
    assert found.largest_score_change == pytest.approx(0.1)
    main_exits(1, "scores", "--diff", str(one), str(other))
    said = capsys.readouterr().out
    assert "plan        variant: onnx-fp32, not torch-int8" in said
    assert "differs     outcome: 1 (v3.mp4)" in said


def test_vectors_are_compared_where_there_are_no_labels_too(tmp_path, capsys):
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    moved = features + np.where(np.arange(6) == 1, 0.01, 1e-6)[:, None]
    one = write(tmp_path / "a", features=features)
    other = write(tmp_path / "b", features=moved)

    found = difference(one, other)

    assert {what: count for what, count in found.counts.items() if count} == {"vectors": 1}
    assert found.examples["vectors"] == ("v1.mp4",)
    main_exits(1, "scores", "--diff", str(one), str(other))
    assert "differs     vectors: 1 (v1.mp4)" in capsys.readouterr().out


def test_two_tables_are_compared_in_a_process_that_did_nothing_before(tmp_path):
    one, other = write(tmp_path / "a"), write(tmp_path / "b")
    program = [sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()"]
    done = subprocess.run([*program, "scores", "--diff", one, other], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "compared    6 videos" in done.stdout


def test_a_difference_says_which_table_is_not_finished(tmp_path, capsys):
    one, other = write(tmp_path / "a"), write(tmp_path / "b", whole=False)

    main_exits(1, "scores", "--diff", str(one), str(other))

    said = capsys.readouterr().out
    assert "not told    rows that are not there yet are not compared\n" in said
    assert not any(difference(one, other).counts.values())
    assert f"first       {one}, complete\n" in said
    assert f"second      {other}, not finished: 6 rows\n" in said
    assert [difference(*pair).complete for pair in ((one, other), (other, one), (one, one))] == [
        False,
        False,
        True,
    ]


def test_vectors_that_one_table_alone_has_are_not_compared(tmp_path):
    plain = write(tmp_path / "a", plan=replace(PLAN, outputs=()))
    more = write(tmp_path / "b", features=np.ones((6, 2), np.float32))
    for one, other in ((plain, more), (more, plain)):
        found = difference(one, other)
        assert not any(found.counts.values())
        assert list(found.plan) == ["outputs"]


def test_tables_that_are_alike_do_not_differ(tmp_path, capsys):
    one = write(tmp_path / "a")
    main_exits(0, "scores", "--diff", str(one), str(write(tmp_path / "b")), "--json")
    assert not any(json.loads(capsys.readouterr().out)["counts"].values())
    other = write(tmp_path / "c", key="other")
    assert difference(one, other).counts["another file"] == 6
    main_exits(2, "scores", "--diff", str(one), str(other), "--reference", str(one))


def test_tables_without_a_row_are_not_called_equal(tmp_path, capsys):
    one, other = (write(tmp_path / name, labels=[], scores=[]) for name in "ab")

    main_exits(3, "scores", "--diff", str(one), str(other))
    assert "has a row, so nothing can be compared" in capsys.readouterr().err
    full = write(tmp_path / "c")
    assert difference(one, full).counts["only in the second"] == 6
    assert difference(full, one).counts["only in the first"] == 6


def test_a_table_with_what_is_no_number_is_damaged(tmp_path):
    """No run writes one: whoever changed it by hand is told which column."""
    features = np.zeros((6, 2), np.float32)
    one = write(tmp_path / "a", features=features)
    assert not any(difference(one, one).counts.values())
    for value in (np.nan, np.inf, -np.inf):
        scores = write(tmp_path / f"s{value}", features=features, scores=[0.95, value, *SCORES[2:]])
        vectors = features.copy()
        vectors[2, 1] = value
        moved = write(tmp_path / f"v{value}", features=vectors)
        for table, column in ((scores, "scores"), (moved, "feature")):
            with pytest.raises(DataError, match=f"is damaged .{column} holds NaN or infinity"):
                difference(one, table)
    with pytest.raises(DataError, match="scores holds NaN"):
        report(scores)


@pytest.mark.parametrize(("moved", "differs"), [(0.5e-5, False), (2e-5, True)])
def test_the_last_digits_of_scores_and_vectors_are_no_difference(tmp_path, moved, differs):
    features = np.full((6, 2), 10.0, np.float32)
    one = write(tmp_path / "a", features=features)
    scores = [None if score is None else score + moved for score in SCORES]
    other = write(tmp_path / "b", features=features * np.float32(1 + 10 * moved), scores=scores)

    counts = difference(one, other).counts
    assert {name: count for name, count in counts.items() if count} == (
        {"scores": 4, "vectors": 4} if differs else {}
    )


def test_where_no_score_is_compared_none_is_said_to_have_moved(tmp_path, capsys):
    one = write(tmp_path / "a", labels=["sit"], scores=[0.5])
    other = write(tmp_path / "b", labels=["turn"], scores=[0.5])

    assert difference(one, other).largest_score_change is None
    main_exits(1, "scores", "--diff", str(one), str(other))
    assert "scores      not compared: no video has the same label in both" in capsys.readouterr().out


def test_more_videos_that_differ_than_are_named_are_counted(tmp_path, capsys):
    one = write(tmp_path / "a", labels=["sit"] * 25, scores=[0.5] * 25)
    other = write(tmp_path / "b", labels=["turn"] * 25, scores=[0.5] * 25)

    main_exits(1, "scores", "--diff", str(one), str(other))
    assert "label: 25 (v0.mp4, " in (said := capsys.readouterr().out)
    assert "v9.mp4 and 15 more)" in said
    assert difference(one, other).examples["label"] == tuple(f"v{place}.mp4" for place in range(20))
    main_exits(
        0, "scores", str(write(tmp_path / "c", labels=[f"l{i}" for i in range(25)], scores=[0.5] * 25))
    )
    assert "l9 1 and 15 more\n" in capsys.readouterr().out


def test_runs_of_another_plan_differ_where_no_row_does(tmp_path, capsys):
    one = write(tmp_path / "a")
    other = write(tmp_path / "b", plan=replace(PLAN, variant="torch-int8"))

    assert not any(difference(one, other).counts.values())
    main_exits(1, "scores", "--diff", str(one), str(other))
    assert "plan        variant: onnx-fp32, not torch-int8\n" in capsys.readouterr().out
