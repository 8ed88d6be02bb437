from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from full_disk import run_on_full_disk
from reported_tables import LABELS, PLAN, main_exits, write

from ivdr_deploy.cli import main
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.errors import ConfigError, DataError, FolderError, MissingDependencyError
from ivdr_deploy.scoring.drift import label_psi, mmd, sample
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.lance import write_lance
from ivdr_deploy.scoring.page import page
from ivdr_deploy.scoring.report import report
from ivdr_deploy.scoring.shard import make_shard
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table


def test_figures_of_a_table(tmp_path):
    found = report(write(tmp_path / "a"))

    assert (found.rows, found.listed) == (6, 6)
    assert found.outcomes == {"ok": 4, "unreadable": 1, "crashed": 1}
    assert found.labels == {"sit": 3, "turn": 1}
    assert found.confidence["bins"] == [0, 0, 0, 1, 0, 1, 0, 0, 1, 1]
    assert found.confidence["mean"] == pytest.approx(0.6525, abs=1e-6)
    assert found.accuracy == {"videos": 3, "failed": 0, "top1": pytest.approx(2 / 3)}
    assert found.seconds == pytest.approx({"video": 8.0, "decode": 0.07, "preprocess": 0.004, "infer": 0.02})
    assert [row["uri"] for row in found.slowest] == ["v4.mp4", "v2.mp4", "v1.mp4", "v0.mp4"]
    assert found.slowest[0]["ms"] == 46.0
    assert [(row["uri"], row["code"]) for row in found.failed] == [
        ("v3.mp4", "unreadable"),
        ("v5.mp4", "crashed"),
    ]
    assert found.drift is None


def test_an_input_that_failed_stays_in_the_denominator_and_what_is_not_named_is_counted(tmp_path, capsys):
    labels = [None, "sit", None, *[None] * 30]
    table = write(tmp_path / "a", labels=labels, scores=[None if label is None else 0.5 for label in labels])

    assert report(table).accuracy == {"videos": 3, "failed": 2, "top1": pytest.approx(1 / 3)}
    main_exits(0, "scores", str(table), "--html", str(tmp_path / "page.html"))
    printed = capsys.readouterr().out
    assert "33.3% of 3 videos got the label of the list; the 2 that failed count as wrong" in printed
    assert "and 22 more that failed" in printed
    assert "<p>and 12 more</p>" in (tmp_path / "page.html").read_text()
    assert "<p>time: video 2.0 s, decode 0.0 s" in (tmp_path / "page.html").read_text()


def test_a_table_that_is_not_finished_is_shown_as_such(tmp_path, capsys):
    main_exits(0, "scores", str(write(tmp_path / "a", whole=False)))

    assert "not finished: 6 rows" in capsys.readouterr().out
    with pytest.raises(DataError, match="is no score table"):
        report(tmp_path)


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_shows_foreign_names_as_text(tmp_path, capsys):
    out = tmp_path / "page.html"
    main_exits(0, "scores", str(write(tmp_path / "a")), "--html", str(out), "--json")

    printed = json.loads(capsys.readouterr().out)
    found = Page()
    found.feed(out.read_text())
    assert not found.links
    assert not found.tags["script"]
    assert not found.tags["b"]
    assert "url(" not in out.read_text()
    assert "<script>v3.mp4" in found.text
    assert "<b>tiny" in found.text
    for name, count in (printed["outcomes"] | printed["labels"]).items():
        assert f"{name}{count}" in found.text
    assert page(report(tmp_path / "a")) == out.read_text()


def test_the_stability_index_is_that_of_a_hand_calculation():
    ours, theirs = Counter(a=50, b=50), Counter(a=75, b=25)
    by_hand = (0.5 - 0.75) * math.log(0.5 / 0.75) + (0.5 - 0.25) * math.log(0.5 / 0.25)
    assert label_psi(ours, theirs) == pytest.approx(by_hand)
    assert label_psi(ours, Counter(a=5, b=5)) == pytest.approx(0.0)
    absent, half = (
        1e-4 / (1 + 1e-4),
        0.5 / (1 + 1e-4),
    )  # of a label that a table lacks, and what is left for others
    by_hand = (0.5 - absent) * math.log(0.5 / absent) + (0.5 - 2 * half) * math.log(0.5 / (2 * half))
    assert label_psi(ours, Counter(b=10)) == pytest.approx(by_hand)
    assert 1.0 < label_psi(ours, Counter(c=10)) < math.inf


def test_the_discrepancy_is_that_of_loops_and_tells_a_shift_from_chance():
    rng = np.random.default_rng(7)
    one, other, shifted = rng.normal(size=(60, 4)), rng.normal(size=(50, 4)), rng.normal(1.0, 1.0, (50, 4))
    both = np.concatenate([one, other])
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(both) for b in both[:i]]

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-((a - b) ** 2).sum() / float(np.median(pairs)))

    within = sum(kernel(a, b) for i, a in enumerate(one) for j, b in enumerate(one) if i != j) / (60 * 59)
    within += sum(kernel(a, b) for i, a in enumerate(other) for j, b in enumerate(other) if i != j) / (
        50 * 49
    )
    across = sum(kernel(a, b) for a in one for b in other) / (60 * 50)

    value, chance = mmd(one, other)
    assert value == pytest.approx(within - 2 * across)
    assert value < chance
    value, chance = mmd(one, shifted)
    assert value > 5 * chance
    assert mmd(one, shifted) == (value, chance)


def test_drift_against_a_reference_is_in_report_page_and_text(tmp_path, capsys):
    rng = np.random.default_rng(3)
    labels, scores = ["sit"] * 40, [0.5] * 40
    ours = write(tmp_path / "a", labels=labels, scores=scores, features=rng.normal(size=(40, 2)))
    theirs = write(
        tmp_path / "b", labels=["turn", *labels[1:]], scores=scores, features=rng.normal(3.0, 1.0, (40, 2))
    )

    drift = report(ours, reference=theirs).drift

    assert drift.labels_psi == pytest.approx(label_psi(Counter(sit=40), Counter(sit=39, turn=1)))
    assert drift.vector == "feature"
    assert drift.mmd > 5 * drift.mmd_by_chance
    main_exits(0, "scores", str(ours), "--reference", str(theirs))
    said = capsys.readouterr().out
    assert f"drift       from {theirs}, complete\n" in said
    assert "drift       feature: MMD² " in said
    assert ", of 40 of 40 and 40 of 40 videos\n" in said
    assert " of 40 videos and 40 (above 0.2 is taken for a shift)\n" in said
    assert "MMD²" in page(report(ours, reference=theirs))


def test_a_reference_of_other_vectors_is_compared_by_labels_or_refused(tmp_path):
    ours = write(tmp_path / "a")
    bare = write(tmp_path / "b", labels=[None] * 6)
    assert report(ours, reference=write(tmp_path / "c")).drift.labels_psi == pytest.approx(0.0)
    plan = replace(PLAN, outputs=())
    inner = tmp_path / "d"
    with open_table(FolderStore(inner), plan, manifest={}) as table:
        item = Input(0, "v", None, "id", "k", "/v")
        row = dict.fromkeys(
            ("model", "model_version", "variant", "contract_hash", "view_plan", "run_id"), "x"
        )
        row |= {"input_key": "k", "video_id": "id", "uri": "v", "status": "error", "error_code": "crashed"}
        table.write(make_shard(plan.run_id, [item]), [row])
    with pytest.raises(ConfigError, match="neither labels nor the same vectors"):
        report(bare, reference=inner)
    with pytest.raises(ConfigError, match=r"nothing can be compared"):  # it has the same vectors, of no video
        report(ours, reference=bare)


def test_what_of_a_reference_cannot_be_compared_is_said(tmp_path, capsys):
    ours = write(tmp_path / "a")
    one = write(tmp_path / "b", labels=["sit", None], scores=[0.5, None], whole=False)
    main_exits(0, "scores", str(ours), "--reference", str(one), "--html", str(tmp_path / "page.html"))
    said = capsys.readouterr().out
    assert f"drift       from {one}, not finished: 2 rows\n" in said
    assert "feature: not compared: 4 videos have one, and 1 of the reference; it takes two of each\n" in said
    assert "not finished: 2 rows" in (tmp_path / "page.html").read_text()
    bare = write(tmp_path / "c", plan=replace(PLAN, outputs=()), labels=["sit"], scores=[0.5])
    main_exits(0, "scores", str(ours), "--reference", str(bare))
    assert "vectors: not compared: the tables have none in common\n" in capsys.readouterr().out


def test_a_table_in_which_every_video_failed_has_no_right_one(tmp_path):
    table = write(tmp_path / "a", plan=replace(PLAN, outputs=()), labels=[None] * 4, scores=[None] * 4)
    assert report(table).accuracy == {"videos": 3, "failed": 3, "top1": 0.0}
    vectors = write(tmp_path / "b", labels=[None] * 4, scores=[None] * 4)
    assert report(vectors).accuracy is None, "the model may have no classifier"


def test_a_table_for_no_input_is_not_merely_complete(tmp_path, capsys):
    empty = write(tmp_path / "a", labels=[], scores=[])
    main_exits(0, "scores", str(empty))
    assert "complete: the list has no input for it\n" in capsys.readouterr().out


def test_what_cannot_be_written_is_named_and_a_long_name_is_cut(tmp_path, capsys):
    labels = [None, *LABELS[1:]]
    table = write(tmp_path / "a", labels=labels, uri="x" * 9000)
    (tmp_path / "page").mkdir()
    main_exits(9, "scores", str(table), "--html", str(tmp_path / "page"))

    said = capsys.readouterr()
    assert said.err == f"ivdr: {tmp_path / 'page'}: Is a directory\n"
    assert "failed      crashed  xxx" in said.out
    assert len(said.out) < 8000
    assert len(page(report(table))) < 12000


def test_what_the_list_passed_over_is_in_text_page_and_json(tmp_path, capsys):
    table = write(tmp_path / "a", left_out=(LeftOut("hidden", 5, (".<b>.mp4", ".b.mp4", ".c.mp4")),))
    main_exits(0, "scores", str(table), "--html", str(tmp_path / "page.html"))
    assert "left out    5 hidden: .<b>.mp4, .b.mp4, .c.mp4 and 2 more" in capsys.readouterr().out
    assert "5 hidden: .&lt;b&gt;.mp4" in (tmp_path / "page.html").read_text()
    main_exits(0, "scores", str(table), "--json")
    assert json.loads(capsys.readouterr().out)["left_out"][0]["count"] == 5


def test_rows_become_a_lance_data_set_that_is_searched_by_vectors(tmp_path, capsys):
    lance = pytest.importorskip("lance")
    features = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [-1, 0], [0, 0]], dtype=np.float32)
    table = write(tmp_path / "table", features=features)

    with pytest.raises(SystemExit) as caught:
        main(["scores", str(table), "--lance", str(tmp_path / "rows.lance")])

    assert caught.value.code in (None, 0)
    assert "6 rows -> " in capsys.readouterr().err
    found = lance.dataset(str(tmp_path / "rows.lance"))
    rows = found.to_table().to_pylist()
    assert [row["uri"] for row in rows] == [f"v{i}.mp4" for i in range(6)]
    assert [row["feature"] for row in rows] == [
        None if label is None else vector.tolist() for label, vector in zip(LABELS, features, strict=True)
    ]
    near = found.to_table(nearest={"column": "feature", "q": features[1], "k": 1})
    assert near["uri"].to_pylist() == ["v1.mp4"]
    with pytest.raises(FolderError, match="there is something at"):
        write_lance(table, tmp_path / "rows.lance")


def test_a_table_in_which_all_failed_becomes_one_too(tmp_path):
    lance = pytest.importorskip("lance")
    table = write(tmp_path / "table", labels=[None, None], scores=[None, None])
    assert write_lance(table, tmp_path / "rows.lance") == 2
    assert lance.dataset(str(tmp_path / "rows.lance")).count_rows() == 2


def test_without_lance_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingDependencyError, match="cannot be imported") as caught:
        write_lance(write(tmp_path / "table"), tmp_path / "rows.lance")
    assert "ivdr-deploy[lance]" in (caught.value.hint or "")
    assert not (tmp_path / "rows.lance").exists()


def test_a_disk_that_is_full_of_lance_is_named(tmp_path):
    pytest.importorskip("lance")
    table = write(tmp_path / "table")

    code, said = run_on_full_disk(
        f"write_lance({str(table)!r}, Path({str(tmp_path / 'rows.lance')!r}))",
        limit=100,
        before="from pathlib import Path\nfrom ivdr_deploy.scoring.lance import write_lance\nfill()",
    )

    assert (code, said) == (9, f"ivdr: {tmp_path}: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_the_discrepancy_of_four_numbers_is_that_of_a_hand_calculation():
    """Distances squared 1, 1, 4, 4, 9, 1 of the pairs of 0, 1 and 2, 3: their median is 2.5."""
    value, chance = mmd(np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]]))
    near, far, farther = (math.exp(-squared / 2.5) for squared in (1, 4, 9))
    assert value == pytest.approx(2 * near - 2 * (near + 2 * far + farther) / 4)
    splits = {  # of the three ways to make two pairs of four numbers
        2 * near - 2 * (near + 2 * far + farther) / 4,
        2 * far - 2 * (2 * near + near + farther) / 4,
        near + farther - 2 * (2 * near + 2 * far) / 4,
    }
    assert chance == pytest.approx(max(splits)), (
        "a third of the divisions give it, more than five of a hundred"
    )


def test_a_large_table_is_looked_at_evenly_and_not_at_its_beginning():
    assert sample(3).tolist() == [0, 1, 2]
    assert len(sample(5000)) == 500
    assert sample(5000)[[0, -1]].tolist() == [0, 4999]
    assert np.diff(sample(5000)).min() > 8
