"""The page of a run or an evaluation, and the rows beside it."""

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from runs import CLIP, finetune_config, rewrite

from ivdr_deploy.datasets.lists import VideoItem, read_video_list
from ivdr_deploy.errors import DataError
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video import VideoLimits
from train.__main__ import main
from train.answers import VideoAnswer, answer, confusion, write_rows
from train.charts import curve
from train.config import DataConfig
from train.evaluate import evaluate
from train.finetune import finetune
from train.page import Page, read_curves, worst_answers, write_page
from train.report import EvaluationReport, report_on
from train.run_page import write_run_page


class _Outline(HTMLParser):
    """Tags that are open at the end, addresses that are named, and the text."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def outline(path: Path) -> _Outline:
    """Read a page, and see that it is whole and needs nothing else."""
    found = _Outline(path.read_text(encoding="utf-8"))
    assert found.open == []
    assert all(address.startswith("data:") for address in found.addresses)
    assert "script" not in found.tags
    assert "url(" not in path.read_text(encoding="utf-8")
    return found


def told(label: str, logits: list[list[float]] | None, *, target: int, unit: str = "") -> VideoAnswer:
    item = VideoItem(Path(label), label, label)
    made = DataError("broken: <b>") if logits is None else np.array(logits)
    return answer(item, unit or label, target, made, clips=2)


def report(labels: tuple[str, ...], answers: list[VideoAnswer]) -> EvaluationReport:
    return report_on(
        answers, labels, model="m", data="d", contract_hash="c", plan=ViewPlan(num_clips=2), units="each"
    )


def test_a_page_shows_everything_there_is_to_say(tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script>'
    answers = [
        told("a", [[3.0, 0.0], [0.0, 1.0]], target=0),
        told("b", [[3.0, 0.0], [2.0, 0.0]], target=1),
        told("c", None, target=1),
    ]
    made = report((hostile, "down"), answers)
    page = Page(
        title=f"run {hostile}",
        alarms=[f"collapse {hostile}"],
        curves={"loss": [(1, 2.0), (2, float("nan")), (3, 1.0)], hostile: [(1, 0.5)]},
        marks={"validation_accuracy": [(2, 0.25)]},
        report=made,
        facts=[("list", hostile)],
        classes={"training": {hostile: 3}, "test": {"down": 2}},
        settings={"optim": {"lr": 0.0031234, "name": hostile}},
    )
    path = write_page(tmp_path / "page.html", page)
    found = outline(path)
    text = " ".join(found.text.split())
    assert text.count(hostile) >= 8
    assert "33.3%" in text
    low, high = made.video_estimate.low, made.video_estimate.high
    assert f"1 of 3; 95 % interval {low:.1%} to {high:.1%}" in text
    assert "broken: <b>" in text
    assert f"down taken for {hostile}" in text
    assert "1 not finite" in text
    assert "optim.lr 0.0031234" in text  # as it was set
    assert "validation_accuracy 0.25" in text
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_known_is_not_on_the_page(tmp_path: Path) -> None:
    text = outline(write_page(tmp_path / "page.html", Page(title="begun"))).text
    for heading in ("Losses", "Accuracy", "Confusion", "Data", "Settings", "worst"):
        assert heading not in text


def test_many_classes_are_listed_and_not_drawn(tmp_path: Path) -> None:
    labels = tuple(f"class {number}" for number in range(101))
    answers = [told(str(row), np.eye(101)[[row // 2]].tolist(), target=row % 101) for row in range(140)]
    path = write_page(tmp_path / "page.html", Page(title="many", report=report(labels, answers)))
    assert 'class="confusion"' not in path.read_text()
    assert "taken for" in outline(path).text
    assert "more pairs" in outline(path).text


def test_confusion_counts_each_video_once_and_the_unusable_in_a_column_of_their_own() -> None:
    answers = [
        told("a", [[3.0, 0.0]], target=0),
        told("b", [[3.0, 0.0]], target=1),
        told("c", None, target=1),
        told("d", [[0.0, 1.0]], target=1),
    ]
    assert confusion(answers, num_classes=2).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_an_answer_is_the_mean_of_the_probabilities_of_its_clips() -> None:
    one = told("a", [[10.0, 0.0], [0.0, 2.0], [0.0, 2.0]], target=1)
    sure, doubtful = 1 / (1 + np.exp(-10.0)), 1 / (1 + np.exp(2.0))
    assert one.probabilities == pytest.approx([(sure + 2 * doubtful) / 3, 1 - (sure + 2 * doubtful) / 3])
    assert one.right  # the mean of the logits would say 0
    assert (one.clips_right, one.clips) == (2, 3)


def test_intervals_are_over_units() -> None:
    """All of one person right and all of the other wrong: two answers, and not twenty."""
    answers = [
        told(str(row), [[0.0, 1.0]] * 2, target=row % 2, unit="ann" if row % 2 else "bea")
        for row in range(20)
    ]
    made = report(("a", "b"), answers)
    for estimate in (made.video_estimate, made.clip_estimate):
        assert (estimate.value, estimate.low, estimate.high, estimate.units) == (0.5, 0.0, 1.0, 2)
    alone = report(("a", "b"), [replace(one, unit=one.item.uri) for one in answers])
    assert alone.video_estimate.units == 20
    assert alone.video_estimate.low > 0.2


def test_the_accuracies_count_what_could_not_be_used() -> None:
    labels = tuple("abcdefg")
    answers = [
        told("first", [[9.0, 1, 0, 0, 0, 0, 0]], target=0),
        told("second", [[9.0, 1, 0, 0, 0, 0, 0]], target=1),
        told("last", [[9.0, 1, 0, 0, 0, 0, -1]], target=6),
        told("none", None, target=0),
    ]
    made = report(labels, answers)
    counted = [
        (one.correct, one.total)
        for one in (made.video_accuracy, made.video_accuracy_top5, made.clip_accuracy)
    ]
    assert counted == [(1, 4), (2, 4), (1, 5)]  # the plan would have taken two clips of the last


def test_the_lowest_point_of_a_curve_is_drawn_lowest_and_a_gap_stays_a_gap() -> None:
    points = [(1, 5.0), (2, 1.0), (3, 3.0), (4, float("inf")), (5, 2.0), (6, 2.5)]
    drawn = re.findall(r'points="([^"]+)"', curve("loss", points))
    assert len(drawn) == 2
    heights = [[float(pair.split(",")[1]) for pair in line.split()] for line in drawn]
    assert heights[0][1] == max(heights[0] + heights[1])  # y grows downwards
    assert heights[0][0] == min(heights[0] + heights[1])


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = [(float(step), 1.0 / (1 + step)) for step in range(10_000)]
    (line,) = re.findall(r'points="([^"]+)"', curve("loss", points))
    assert 300 < len(line.split()) <= 600
    assert "9999" in curve("loss", points)


def test_steps_that_could_not_be_measured_take_no_neighbour_out_of_a_long_curve() -> None:
    """Such as the ranking of shuffled clips where chance shuffled none."""
    points = [(float(step), math.nan if step % 3 else 0.5) for step in range(3000)]
    drawn = re.findall(r'points="([^"]+)"', curve("swapped_accuracy", points))
    assert len(drawn) == 1
    assert len(drawn[0].split()) == 600


def test_a_log_that_is_half_written_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_curves(path) == {}
    path.write_text("step,loss,lr\n1,2.5,0.1\n2,nan,0.1\n3,1.")
    found = read_curves(path)
    assert [step for step, _ in found["lr"]] == [1.0, 2.0]
    assert found["loss"][0] == (1.0, 2.5)


def test_a_failed_write_leaves_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_page(tmp_path / "page.html", Page(title="first"))

    def full(*args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_page(path, Page(title="second"))
    monkeypatch.undo()
    assert "first" in outline(path).text


def test_alarms_of_the_run_folder_stand_at_the_top(data: DataConfig, tmp_path: Path) -> None:
    alarm = {"step": "40", "name": "collapse", "message": "all fall together", "hint": "lower optim.lr"}
    (tmp_path / "alarms.json").write_text(json.dumps([alarm]))
    config = finetune_config(tmp_path, data)
    path = write_run_page(config, read_video_list(data.train), state="step 40 of 80")
    assert "collapse at step 40: all fall together; lower optim.lr" in outline(path).text
    assert "step 40 of 80" in outline(path).text


# --- of real runs


def test_a_run_leaves_a_page_with_its_curves_answers_and_settings(data: DataConfig, tmp_path: Path) -> None:
    swapped = rewrite(data.test, tmp_path / "test.csv", down0="up", up0="down")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with Path(swapped.test).open("a") as stream:
        stream.write("broken.mp4,up\n")
    finetune(finetune_config(tmp_path / "run", replace(data, test=swapped.test)))
    html = (tmp_path / "run" / "page.html").read_text()
    found = outline(tmp_path / "run" / "page.html")
    for said in ("loss_label", "ended after 2 steps", "optim.batch_size", "broken.mp4", "16, 2 classes"):
        assert said in found.text
    assert "1 test videos could not be used" in found.text
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", html)
    assert len(pictures) >= 4
    with av.open(io.BytesIO(base64.b64decode(pictures[0])), format="mjpeg") as jpeg:
        (picture,) = jpeg.decode(video=0)
        assert (picture.width, picture.height) == (CLIP.crop_size, CLIP.crop_size)


def test_evaluate_writes_page_report_and_a_row_for_every_video(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finetune(finetune_config(tmp_path / "run", replace(data, test="")))
    lists = rewrite(data.test, tmp_path / "test.csv")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with Path(lists.test).open("a") as stream:
        stream.write("broken.mp4,up\n")
    out = tmp_path / "measured"
    assert main(["evaluate", str(path), "--data", lists.test, "-o", str(out), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((out / "report.json").read_text()) == printed
    rows = [json.loads(line) for line in (out / "videos.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((out / "videos.csv").read_text().splitlines()))
    assert len(rows) == len(table) == 7
    assert sum(row["right"] for row in rows) == printed["video_accuracy"]["correct"]
    assert sum(row["clips_right"] for row in rows) == printed["clip_accuracy"]["correct"]
    assert sum(row["clips"] for row in rows) == printed["clip_accuracy"]["total"]
    assert [row["uri"] for row in rows] == [row["uri"] for row in table]
    assert (rows[-1]["predicted"], rows[-1]["right"], table[-1]["predicted"]) == (None, False, "")
    assert "broken.mp4" in rows[-1]["error"]
    assert printed["intervals"]["video_accuracy"]["units"] == 7
    outline(out / "page.html")


def test_the_worst_answers_are_wrong_ones_the_least_probable_first(data: DataConfig, tmp_path: Path) -> None:
    path = finetune(finetune_config(tmp_path / "run", replace(data, test="")))
    flipped = rewrite(data.test, tmp_path / "t.csv", **{f"down{n}": "up" for n in range(3)})
    made = evaluate(path, flipped.test)
    shown = worst_answers(made, CLIP, limits=VideoLimits())
    assert shown
    assert all(not one.right for one, _ in shown)
    assert [one.of_truth for one, _ in shown] == sorted(one.of_truth for one, _ in shown)


def test_rows_hold_any_name(tmp_path: Path) -> None:
    item = VideoItem(Path("x"), "a", 'new\nline, "quoted" caf\udce9.mp4')
    one = answer(item, item.uri, 0, np.array([[1.0, 0.0]]), clips=1)
    for suffix in (".csv", ".jsonl"):
        write_rows(tmp_path / f"rows{suffix}", [one], ["a", "b"])
    (row,) = csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text(encoding="utf-8"), newline=""))
    (line,) = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert row["uri"] == json.loads(line)["uri"] == 'new\nline, "quoted" caf\\xe9.mp4'
    write_rows(tmp_path / "none.csv", [], ["a"])
