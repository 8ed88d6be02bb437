"""Evaluation, and the commands one after the other."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import finetune_config, rewrite

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.results import Outcome
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video import Source
from train.__main__ import main
from train.comparison import compare
from train.config import DataConfig
from train.evaluate import ANSWERS, evaluate, evaluate_model
from train.features import forget
from train.finetune import finetune

DEMO_CONFIG = str(Path(__file__).resolve().parents[2] / "train" / "configs" / "demo_finetune.toml")


def test_checkpoint_without_a_classifier_cannot_be_evaluated(pretrained: Path, data: DataConfig) -> None:
    with pytest.raises(CheckpointError, match="no classifier"):
        evaluate(pretrained, data.test)


def test_bad_test_video_is_reported_and_counts_as_wrong(data: DataConfig, tmp_path: Path) -> None:
    path = finetune(finetune_config(tmp_path / "run", replace(data, test="")))
    lists = rewrite(data.test, tmp_path / "test.csv")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with Path(lists.test).open("a") as stream:
        stream.write("broken.mp4,up\n")
    report = evaluate(path, lists.test)
    assert [uri for uri, _ in report.failed] == ["broken.mp4"]
    without = evaluate(path, data.test)
    assert report.video_accuracy == without.video_accuracy.with_wrong(1)
    assert report.video_accuracy_top5 == without.video_accuracy_top5.with_wrong(1)
    assert report.clip_accuracy == without.clip_accuracy.with_wrong(2)
    assert report.per_class["up"] == without.per_class["up"].with_wrong(1)
    assert report.per_class["down"] == without.per_class["down"]
    assert report.to_dict()["failed"][0]["uri"] == "broken.mp4"


def test_a_measurement_that_was_stopped_goes_on_from_its_answers(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finetune(finetune_config(tmp_path / "run", replace(data, test="")))
    asked: list[int] = []
    whole = VideoPredictor.predict_many

    def stopped(self: VideoPredictor, sources: Sequence[Source], **given: Any) -> Iterator[Outcome]:
        asked.append(len(sources))
        for count, outcome in enumerate(whole(self, sources, **given)):
            if count == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield outcome

    monkeypatch.setattr(VideoPredictor, "predict_many", stopped)
    out = tmp_path / "measured"
    with pytest.raises(KeyboardInterrupt):
        evaluate(path, data.test, out=out)
    assert len(list((out / ANSWERS).iterdir())) == 2
    again = evaluate(path, data.test, out=out)
    assert asked == [6, 4]
    assert sorted(file.name for file in out.iterdir()) == [
        "page.html",
        "report.json",
        "videos.csv",
        "videos.jsonl",
    ]
    alone = evaluate(path, data.test)
    assert asked == [6, 4, 6]  # what was measured is measured anew
    assert again.to_dict() == alone.to_dict()


@pytest.mark.parametrize("stopped_in", [0, 1])
def test_a_comparison_that_was_stopped_goes_on_from_the_answers_of_both(
    stopped_in: int, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (
        finetune(replace(finetune_config(tmp_path / name, replace(data, test="")), seed=seed))
        for name, seed in (("one", 1), ("other", 2))
    )
    asked: list[int] = []
    whole = VideoPredictor.predict_many

    def stopped(self: VideoPredictor, sources: Sequence[Source], **given: Any) -> Iterator[Outcome]:
        asked.append(len(sources))
        for count, outcome in enumerate(whole(self, sources, **given)):
            if count == 2 and len(asked) == stopped_in + 1:
                raise KeyboardInterrupt
            yield outcome

    monkeypatch.setattr(VideoPredictor, "predict_many", stopped)
    out = tmp_path / "measured"
    words = ["evaluate", str(one), "--data", data.test, "--against", str(other), "-o", str(out)]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 130
    assert len(list((out / ANSWERS).iterdir())) == 6 * stopped_in + 2
    assert main(words) == 0
    assert asked == ([6, 4, 6] if stopped_in == 0 else [6, 6, 4])
    assert not (out / ANSWERS).exists()
    report = json.loads((out / "report.json").read_text())
    assert report == evaluate(one, data.test).to_dict() | {
        "comparison": compare(evaluate(other, data.test), evaluate(one, data.test)).to_dict()
    }


def test_answers_of_another_network_are_not_taken(data: DataConfig, tmp_path: Path) -> None:
    one, other = (
        finetune(replace(finetune_config(tmp_path / name, replace(data, test="")), seed=seed))
        for name, seed in (("one", 1), ("other", 2))
    )
    kept = tmp_path / "kept"
    reports = []
    for path in (one, other):
        with (model := open_model(path)).runtime:
            reports.append(evaluate_model(model, read_video_list(data.test), kept=kept))
    assert len(list(kept.iterdir())) == 12
    assert [found.of_truth for found in reports[1].answers] == pytest.approx(
        [found.of_truth for found in evaluate(other, data.test).answers]
    )
    (kept / "mine.txt").write_text("not of an evaluation")
    forget(kept)
    assert [file.name for file in kept.iterdir()] == ["mine.txt"]


def test_checkpoint_and_card_say_how_many_test_videos_failed(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = rewrite(data.test, tmp_path / "test.csv")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with Path(lists.test).open("a") as stream:
        stream.write("broken.mp4,up\n")
    path = finetune(finetune_config(tmp_path / "run", replace(data, test=lists.test)))
    assert "test video failed, counted as wrong: broken.mp4: " in capsys.readouterr().err
    metrics = load_checkpoint(path).info.provenance.metrics
    assert (metrics["test_videos"], metrics["test_videos_failed"]) == (7, 1)
    assert metrics["video_accuracy"] == evaluate(path, lists.test).video_accuracy.value
    card = (export_bundle(path, tmp_path / "bundle").path / "MODEL_CARD.md").read_text()
    assert "- 1 of the 7 test videos could not be used; they count as wrong." in card


def test_a_list_of_failures_is_no_accuracy_at_all_and_keeps_the_training(
    data: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "test.csv").write_text("path,label\nbroken.mp4,up\n")
    path = finetune(finetune_config(tmp_path / "run", replace(data, test=str(tmp_path / "test.csv"))))
    assert load_checkpoint(path).info.provenance.metrics["video_accuracy"] == 0.0


def test_a_label_in_brackets_is_no_style(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(data.test).read_text().replace(",up", ",[/up]").replace(",down", ",down [red]").splitlines()
    odd = Path(data.test).with_name("brackets.csv")
    odd.write_text("\n".join(lines) + "\n")
    path = finetune(finetune_config(tmp_path / "run", replace(data, train=str(odd), test="")))
    for protocol in ([], ["--protocol", "order"]):
        assert main(["evaluate", str(path), "--data", str(odd), *protocol]) == 0
        said = capsys.readouterr().err
        assert "[/up]" in said
        assert "down [red]" in said


def test_a_class_without_test_videos_is_null_in_the_json(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finetune(finetune_config(tmp_path / "run", replace(data, test="")))
    lines = Path(data.test).read_text().splitlines()
    short = Path(data.test).with_name("up.csv")
    short.write_text("\n".join([lines[0], *(line for line in lines if line.endswith(",up"))]) + "\n")
    capsys.readouterr()
    assert main(["evaluate", str(path), "--data", str(short), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["per_class"]["down"] == {"value": None, "correct": 0, "total": 0, "low": 0.0, "high": 1.0}


# --- command line


def test_commands_chain_and_evaluate_prints_json(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        "log_every = 1\n[clip]\nnum_frames = 4\nshort_side = 36\ncrop_size = 32\n[view_plan]\nnum_clips = 2\n"
        '[model]\nbackbone = "tiny"\n[optim]\nepochs = 1\nbatch_size = 8\n'
    )
    lists = [f"data.train={data.train}", f"data.cache={data.cache}"]
    first, second = tmp_path / "a", tmp_path / "b"
    assert main(["pretrain", "--config", str(config), f"out={first}", *lists]) == 0
    init = f"init={first / 'checkpoint.safetensors'}"
    assert main(["finetune", "--config", str(config), f"out={second}", init, *lists]) == 0
    capsys.readouterr()
    checkpoint = str(second / "checkpoint.safetensors")
    for options, clips, said in (
        ([], 2, "on 2 clips, centre crop (the checkpoint's plan)"),
        (["--clips", "1"], 1, "on 1 clip, centre crop (--clips 1)"),
        (["--protocol", "ten-clip"], 10, "on 10 clips, centre crop (--protocol ten-clip)"),
    ):
        assert main(["evaluate", checkpoint, "--data", data.test, "--json", *options]) == 0
        printed = capsys.readouterr()
        report = json.loads(printed.out)
        assert report["view_plan"] == to_dict(ViewPlan(num_clips=clips))
        assert report["clip_accuracy"]["total"] == 6 * clips
        assert said in printed.err.splitlines()[-1]
    assert report["video_accuracy"]["total"] == 6
    assert set(report["per_class"]) == {"down", "up"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "--config", "none.toml"], 2, "no config file at none.toml"),
        (["finetune", "--config", DEMO_CONFIG, "optim.lrr=1"], 2, "did you mean 'lr'"),
        (
            ["finetune", "--config", DEMO_CONFIG, "data.train=none.csv"],
            3,
            "no list of videos at none.csv",
        ),
        (
            ["evaluate", "none.safetensors", "--data", "none.csv", "--clips", "0"],
            2,
            "num_clips must be between 1 and",
        ),
        (["evaluate", "none.safetensors", "--data", "none.csv"], 5, "none.safetensors is absent"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert not list(tmp_path.iterdir()), "a run that could not begin leaves no folder"
    assert caught.value.code == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train: ")
    assert message in last
