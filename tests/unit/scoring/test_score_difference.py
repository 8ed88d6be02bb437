"""What differs between two tables."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from reported_tables import PLAN, main_exits, write

from ivdr_deploy.scoring.difference import difference


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

    main_exits(0, "scores", "--diff", str(one), str(other))

    said = capsys.readouterr().out
    assert f"first       {one}, complete\n" in said
    assert f"second      {other}, not finished: 6 rows\n" in said


def test_tables_that_are_alike_do_not_differ(tmp_path, capsys):
    one = write(tmp_path / "a")
    main_exits(0, "scores", "--diff", str(one), str(write(tmp_path / "b")), "--json")
    assert not any(json.loads(capsys.readouterr().out)["counts"].values())
    other = write(tmp_path / "c", key="other")
    assert difference(one, other).counts["another file"] == 6
    main_exits(2, "scores", "--diff", str(one), str(other), "--reference", str(one))
