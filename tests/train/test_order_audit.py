"""The order audit, and the comparison of two models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import finetune_config

from ivdr_deploy.datasets.lists import VideoItem, read_video_list
from ivdr_deploy.errors import ConfigError, DataError
from ivdr_deploy.evaluation.order import feature_change, reversed_clips, shuffled_clips
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video import PathSource
from ivdr_deploy.video.clips import load_clips
from train import evaluate as module
from train.__main__ import main
from train.answers import VideoAnswer, answer
from train.comparison import compare, mcnemar
from train.config import AugmentConfig, DataConfig
from train.evaluate import evaluate, evaluate_model
from train.finetune import finetune
from train.order_audit import OrderAudit, audit_order
from train.report import report_on


@pytest.fixture(scope="module")
def mover(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells down from up, which only order does."""
    config = finetune_config(
        tmp_path_factory.mktemp("mover"),
        replace(data, test=""),
        augment=AugmentConfig(jitter_probability=0.0),
    )
    optim = replace(config.optim, epochs=15, lr=3e-3)
    return finetune(replace(config, optim=optim, log_every=100))


def test_backwards_a_network_that_sees_motion_answers_the_opposite(mover: Path, data: DataConfig) -> None:
    model = open_model(mover)
    with model.runtime:
        found = audit_order(model, read_video_list(data.test))
    report = found.to_dict()
    assert report["video_accuracy"]["true"]["value"] == evaluate(mover, data.test).video_accuracy.value == 1.0
    assert report["video_accuracy"]["reversed"]["value"] == 0.0
    assert report["drop"]["reversed"]["value"] == 1.0
    assert report["drop"]["reversed"]["low"] == 1.0
    assert report["feature_change"]["reversed"] > 0.01
    assert report["feature_change"]["shuffled"] > 1e-3
    assert report["per_class"]["up"]["accuracy_reversed"] == 0.0
    assert report["per_class"]["up"]["videos"] == 3
    assert report["segments"] == 2


def test_a_network_that_sees_no_order_is_told_so(mover: Path, data: DataConfig) -> None:
    model = open_model(mover)
    true = model.runtime.infer

    def blind(video: np.ndarray) -> dict[str, np.ndarray]:
        return true(np.sort(video, axis=1))  # the same for every order of the frames

    model.runtime.infer = blind  # type: ignore[method-assign]
    with model.runtime:
        report = audit_order(model, read_video_list(data.test)).to_dict()
    for change in ("reversed", "shuffled"):
        assert report["drop"][change]["value"] == 0.0
        assert report["feature_change"][change] == pytest.approx(0.0, abs=1e-6)


def test_a_video_that_cannot_be_used_is_wrong_in_every_order(
    mover: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Path(data.test).read_text().splitlines()
    lines = [rows[0], *(f"{Path(data.test).parent}/{row}" for row in rows[1:]), f"{tmp_path}/broken.mp4,up"]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    words = ["evaluate", str(mover), "--data", str(tmp_path / "t.csv"), "--protocol", "order", "--json"]
    assert main(words) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["video_accuracy"]["true"]["value"] == pytest.approx(6 / 7)
    assert len(report["failed"]) == 1
    assert report["per_class"]["up"]["videos"] == 4


def overflow(name: str, value: float) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def spoil(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        spoilt = outputs[name].copy()
        spoilt[-1, 0] = value
        return outputs | {name: spoilt}

    return spoil


def refuse(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    raise RuntimeError("no memory for this one")


@pytest.mark.parametrize("way", ["true", "reversed"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (overflow("logits", np.nan), "the network gives NaN or infinity in logits"),
        (overflow("logits", np.inf), "the network gives NaN or infinity in logits"),
        (overflow("feature", np.nan), "the network gives NaN or infinity in feature"),
        (refuse, "the network failed on this video (RuntimeError: no memory for this one)"),
    ],
    ids=["nan", "infinity", "feature", "exception"],
)
def test_a_video_on_which_the_network_fails_is_wrong_in_every_order(
    spoil: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    said: str,
    way: str,
    mover: Path,
    data: DataConfig,
) -> None:
    model, videos = open_model(mover), read_video_list(data.test)
    bad = load_clips(
        PathSource(videos.items[0].path), model.clip, model.view_plan
    ).video  # of the first class
    hit = bad if way == "true" else reversed_clips(bad)
    whole = model.runtime.infer

    def infer(video: np.ndarray) -> dict[str, np.ndarray]:
        outputs = whole(video)
        return spoil(outputs) if np.array_equal(video, hit) else outputs

    with model.runtime:
        before = audit_order(model, videos)
        model.runtime.infer = infer  # type: ignore[method-assign]
        audit = audit_order(model, videos)
        failed = dict(evaluate_model(model, replace(videos, items=videos.items[:1])).failed)
    report = audit.to_dict()
    (entry,) = report["failed"]
    assert entry["uri"] == videos.items[0].uri
    assert entry["reason"].startswith(said)
    assert failed == ({entry["uri"]: entry["reason"]} if way == "true" else {})
    for name in ("true", "reversed", "shuffled"):
        assert audit.answers[name][0].probabilities is None
        assert audit.answers[name][1].right == before.answers[name][1].right
    for name in ("reversed", "shuffled"):
        assert np.isnan(audit.feature_changes[name][0])
        assert audit.feature_changes[name][1:] == before.feature_changes[name][1:]


def test_segments_that_do_not_divide_a_clip_are_refused(mover: Path, data: DataConfig) -> None:
    model = open_model(mover)
    with model.runtime, pytest.raises(ConfigError, match="3 segments do not divide a clip of 4 frames"):
        audit_order(model, read_video_list(data.test), segments=3)


@pytest.mark.parametrize("segments", [2, 4])
def test_shuffling_moves_whole_segments_and_never_leaves_them_all(segments: int) -> None:
    clips = np.arange(8, dtype=np.uint8)[None, :, None, None, None].repeat(20, axis=0)
    other = shuffled_clips(clips, segments, rng=np.random.default_rng(0))[:, :, 0, 0, 0]
    size = 8 // segments
    for row in other:
        assert sorted(row.tolist()) == list(range(8))
        assert row.tolist() != list(range(8))
        for part in row.reshape(segments, size):
            assert part.tolist() == list(range(part[0], part[0] + size))
    assert reversed_clips(clips)[0, :, 0, 0, 0].tolist() == list(range(7, -1, -1))


def test_the_change_of_a_feature_is_one_minus_the_cosine() -> None:
    assert feature_change(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])) == pytest.approx(1.0)
    assert feature_change(np.array([[1.0, 1.0]]), np.array([[3.0, 3.0]])) == pytest.approx(0.0)
    assert feature_change(np.zeros((1, 2)), np.array([[3.0, 3.0]])) == 0.0


def test_the_change_of_a_feature_is_that_of_the_mean_over_clips() -> None:
    one, two = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, -1.0]])
    assert feature_change(one, two) == pytest.approx(1.0)  # along the diagonals; the first clips are the same
    assert feature_change(one, one[::-1]) == pytest.approx(0.0)


# --- comparison


def test_a_comparison_is_paired_by_video(mover: Path, data: DataConfig, tmp_path: Path) -> None:
    other = finetune(finetune_config(tmp_path / "other", replace(data, test="")))
    before, now = evaluate(other, data.test), evaluate(mover, data.test)
    found = compare(before, now)
    assert found.change.won == 6 - before.video_accuracy.correct
    assert found.change.lost == 0
    assert len(found.won) == found.change.won
    assert found.change.value == pytest.approx(now.video_accuracy.value - before.video_accuracy.value)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["p_value"] == found.p_value
    with pytest.raises(DataError, match="not measured on the same videos"):
        compare(before, evaluate(mover, data.train))


@pytest.mark.parametrize("failing", ["this", "other"])
def test_what_only_one_of_two_models_answers_is_said_to_be_so(
    failing: str,
    mover: Path,
    data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = finetune(finetune_config(tmp_path / "other", replace(data, test="")))
    before = evaluate(other, data.test)
    item = next(one.item for one in before.answers if one.right)  # and mover has all right
    (tmp_path / "t.csv").write_text(
        "path,label\n"
        + "".join(f"{one.item.path},{before.labels[one.target]}\n" for one in before.answers)
        + "broken.mp4,up\n"
    )
    (tmp_path / "broken.mp4").write_bytes(b"no video")

    def open_failing(path: str | Path, **given: Any) -> LoadedModel:
        model = open_model(path, **given)
        if Path(path) == (mover if failing == "this" else other):
            whole = model.runtime.infer
            hit = load_clips(PathSource(item.path), model.clip, model.view_plan).video

            def infer(video: np.ndarray) -> dict[str, np.ndarray]:
                outputs = whole(video)
                rows = [any(np.array_equal(row, one) for one in hit) for row in video]
                return outputs | {
                    "logits": np.where(np.array(rows)[:, None], np.float32(np.nan), outputs["logits"])
                }

            model.runtime.infer = infer  # type: ignore[method-assign]
        return model

    monkeypatch.setattr(module, "open_model", open_failing)
    words = ["evaluate", str(mover), "--data", str(tmp_path / "t.csv"), "--against", str(other), "--json"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)["comparison"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["comparison"] == found
    names = {name: [one["uri"] for one in found[f"failed_{name}"]] for name in ("before", "now")}
    both, alone = ["broken.mp4"], [str(item.path), "broken.mp4"]
    assert names == ({"before": alone, "now": both} if failing == "other" else {"before": both, "now": alone})
    assert all("NaN" in found[f"failed_{name}"][0]["reason"] for name in names if names[name] == alone)
    assert (str(item.path) in found["won"]) == (failing == "other")
    assert (str(item.path) in found["lost"]) == (failing == "this")
    said = "1 won since the other model" if failing == "other" else "1 lost since this model"
    assert f"; of these {said} gave no answer" in printed.err
    assert (f"failed with {other}: {item.path}: the network gives NaN" in printed.err) == (failing == "other")
    assert printed.err.count("broken.mp4: ") == 1


def test_a_failure_of_the_other_model_alone_is_no_success(
    mover: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(str(shutil.copytree(mover.parent, mover.parent.parent / "copy"))) / mover.name

    def open_failing(path: str | Path, **given: Any) -> LoadedModel:
        model = open_model(path, **given)
        if Path(path) == other:
            model.runtime.infer = refuse  # type: ignore[method-assign, assignment]
        return model

    monkeypatch.setattr(module, "open_model", open_failing)
    words = ["evaluate", str(mover), "--data", data.test, "--against", str(other), "--json"]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert (json.loads(printed.out)["failed"], len(json.loads(printed.out)["comparison"]["won"])) == ([], 6)
    assert (
        "won 6, lost 0 of 6, p = 0.0312; of these 6 won since the other model gave no answer" in printed.err
    )
    assert printed.err.count(f"failed with {other}: ") == 6


def test_changes_are_taken_over_units() -> None:
    """All of one person is lost and nothing of the other: two answers, and not twelve."""
    ways: dict[str, list[VideoAnswer]] = {}
    for name in ("true", "reversed", "shuffled"):
        ways[name] = [
            answer(
                VideoItem(Path(f"{row}.mp4"), "ab"[row % 2], f"{row}.mp4"),
                "ann" if row < 6 else "bea",
                row % 2,
                np.eye(2)[[row % 2 if name == "true" or row < 6 else 1 - row % 2]],
                clips=1,
            )
            for row in range(12)
        ]
    changes = {"reversed": (0.0,) * 12, "shuffled": (0.0,) * 12}
    given = {name: tuple(one) for name, one in ways.items()}
    audit = OrderAudit(
        model="m", data="d", labels=("a", "b"), segments=2, units="u", answers=given, feature_changes=changes
    )
    for change in ("reversed", "shuffled"):
        drop = audit.drop(change)
        assert (drop.value, drop.low, drop.high, drop.units) == (0.5, 0.0, 1.0, 2)
    before, now = (
        report_on(ways[name], ("a", "b"), model="m", data="d", contract_hash="c", plan=ViewPlan(), units="u")
        for name in ("true", "reversed")
    )
    by_units = compare(before, now).by_units
    assert (by_units.value, by_units.low, by_units.high, by_units.units) == (-0.5, -1.0, 0.0, 2)


@pytest.mark.parametrize(
    ("lost", "won", "p_value"), [(0, 0, 1.0), (0, 6, 2 / 64), (5, 5, 1.0), (1, 9, 22 / 1024), (3, 0, 0.25)]
)
def test_mcnemars_test_by_hand(lost: int, won: int, p_value: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p_value)


def test_the_command_compares(mover: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(mover), "--data", data.test, "--against", str(mover), "--json"]) == 0
    printed = capsys.readouterr()
    comparison = json.loads(printed.out)["comparison"]
    assert (comparison["video_accuracy"]["value"], comparison["p_value"]) == (0.0, 1.0)
    assert "won 0, lost 0 of 6, p = 1" in printed.err
