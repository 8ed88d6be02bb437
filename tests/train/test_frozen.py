"""What a backbone is worth as it is: retrieval, neighbours, a linear probe; on features computed once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import CLIP, PLAN, finetune_config

from ivdr_deploy.artifacts.manifest import write_manifest
from ivdr_deploy.datasets.lists import VideoItem, VideoList, read_video_list
from ivdr_deploy.errors import CheckpointError, DataError, VideoOpenError
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.torch_runtime import LAYOUT_KEY
from ivdr_deploy.spec import Precision, ViewPlan
from train import frozen as module
from train.__main__ import main
from train.config import DataConfig
from train.finetune import finetune
from train.frozen import Frozen, classify, open_frozen, retrieve

HALVES: tuple[Precision, ...] = ("bf16", "fp16")
LAYOUT = {LAYOUT_KEY: "contiguous"}


@pytest.fixture
def frozen(pretrained: Path, data: DataConfig, tmp_path: Path) -> Frozen:
    return open_frozen(open_model(pretrained), data.train, data.test, tmp_path / "cache", plan=PLAN)


def planted(frozen: Frozen, gallery: np.ndarray, queries: np.ndarray) -> Frozen:
    """The same lists with other features, one clip each."""
    rows = [tuple(row[None].astype(np.float32) for row in made) for made in (gallery, queries)]
    return module.replace(frozen, gallery_features=rows[0], query_features=rows[1])


def test_retrieval_is_that_of_the_paper_done_by_hand(frozen: Frozen) -> None:
    rng = np.random.default_rng(3)
    gallery, queries = rng.normal(2.0, 1.0, (16, 5)), rng.normal(-1.0, 1.0, (6, 5))
    made = retrieve(planted(frozen, gallery, queries))
    owners = [item.label for item in frozen.gallery.items]
    one = (gallery - gallery.mean(0)).astype(np.float32)
    two = (queries - queries.mean(0)).astype(np.float32)  # each set by its own mean
    cosine = (two @ one.T) / np.outer(np.linalg.norm(two, axis=1), np.linalg.norm(one, axis=1))
    for k in (1, 5, 10):
        hits = 0
        for row, item in enumerate(frozen.queries.items):
            nearest = np.argsort(-cosine[row])[:k]
            hits += item.label in {owners[place] for place in nearest}
        assert made.recalls[k].value == pytest.approx(hits / 6)
    assert made.recalls[50].value == 1.0
    assert list(made.recalls) == [1, 5, 10, 20, 50]
    assert (made.queries, made.gallery_videos) == (6, 16)
    assert made.recalls[1].low < made.recalls[1].value < made.recalls[1].high or made.recalls[1].value in (
        0,
        1,
    )


def several(frozen: Frozen, *, gallery: int = 30, queries: int = 12) -> Frozen:
    """Lists of three classes with three clips a video that lie far from 0; the queries are of four groups."""
    rng = np.random.default_rng(4)
    made: list[tuple[VideoList, tuple[np.ndarray, ...]]] = []
    for name, count in (("g", gallery), ("q", queries)):
        items = [
            VideoItem(Path(f"{name}{row}.mp4"), "abc"[row % 3], f"{name}{row}.mp4", f"{name}{row % 4}")
            for row in range(count)
        ]
        rows = tuple(rng.normal(3.0, 1.0, (3, 5)).astype(np.float32) for _ in items)
        made.append((VideoList(Path(name), tuple(items)), rows))
    (one, shown), (two, asked) = made
    return module.replace(
        frozen, gallery=one, queries=two, gallery_features=shown, query_features=asked, labels=("a", "b", "c")
    )


def test_neighbours_vote_as_they_are_said_to(frozen: Frozen) -> None:
    made = several(frozen)
    report = classify(made, "knn")
    gallery, queries = (
        np.stack([np.asarray(one).mean(axis=0) for one in part]).astype(float)
        for part in (made.gallery_features, made.query_features)
    )
    centre = gallery.mean(axis=0)
    for query, answer in zip(queries, report.answers, strict=True):
        one, all_of_them = query - centre, gallery - centre
        cosine = all_of_them @ one / np.linalg.norm(all_of_them, axis=1) / np.linalg.norm(one)
        votes = np.zeros(3)
        for place in sorted(range(30), key=lambda place: -cosine[place])[:20]:
            votes["abc".index(str(made.gallery.items[place].label))] += np.exp(cosine[place] / 0.07)
        assert answer.probabilities == pytest.approx(votes / votes.sum(), rel=1e-4)


def test_retrieval_takes_the_mean_over_the_clips_and_intervals_over_groups(frozen: Frozen) -> None:
    made = several(frozen)
    means = [
        np.stack([np.asarray(one).mean(axis=0) for one in part])
        for part in (made.gallery_features, made.query_features)
    ]
    by_means = planted(made, *means)
    found = retrieve(made)
    assert {k: one.value for k, one in found.recalls.items()} == {
        k: one.value for k, one in retrieve(by_means).recalls.items()
    }
    assert 0.0 < found.recalls[1].value < 1.0
    assert [one.units for one in found.recalls.values()] == [4] * 5
    assert found.units == "column group of the list"
    report = classify(made, "knn")
    assert (report.video_estimate.units, report.clip_estimate.units) == (4, 4)


def test_the_penalty_of_a_probe_is_chosen_on_held_out_groups_of_the_gallery(
    frozen: Frozen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = several(frozen, gallery=36)  # of noise, of which the strongest penalty makes least
    for item in made.gallery.items:
        (tmp_path / item.uri).touch()
    there = tuple(
        VideoItem(tmp_path / item.uri, item.label, item.uri, item.group) for item in made.gallery.items
    )
    classify(module.replace(made, gallery=VideoList(tmp_path, there)), "linear-probe")
    said = capsys.readouterr().err
    assert "36 of 36 videos, 4 of 4 groups (column group of the list)" in said
    assert "penalty 1, chosen on held-out groups" in said


def test_an_unusable_query_finds_nothing_and_stays_in_the_denominator(frozen: Frozen) -> None:
    lost = (VideoOpenError("broken"), *frozen.query_features[1:])
    made, before = retrieve(module.replace(frozen, query_features=lost)), retrieve(frozen)
    assert made.queries == 6
    assert made.recalls[50].value == pytest.approx(5 / 6)
    assert before.recalls[50].value == 1.0
    assert [uri for uri, _ in made.failed] == [frozen.queries.items[0].uri]
    knn = classify(module.replace(frozen, query_features=lost), "knn")
    assert knn.video_accuracy.total == 6
    assert len(knn.failed) == 1


@pytest.mark.parametrize("protocol", ["knn", "linear-probe"])
def test_features_that_tell_the_classes_apart_are_worth_everything(
    frozen: Frozen, protocol: module.Protocol
) -> None:
    rng = np.random.default_rng(0)

    def made(items: tuple[object, ...]) -> np.ndarray:
        ways = np.array([[4.0, 1.0] if item.label == "up" else [-4.0, 1.0] for item in items])  # type: ignore[attr-defined]
        return np.hstack([ways, np.ones((len(items), 3))]) + rng.normal(0, 0.3, (len(items), 5))

    apart = planted(frozen, made(frozen.gallery.items), made(frozen.queries.items))
    report = classify(apart, protocol)
    assert report.video_accuracy.correct == report.video_accuracy.total == 6
    noise = planted(frozen, rng.normal(size=(16, 5)), rng.normal(size=(6, 5)))
    assert classify(noise, protocol).video_accuracy.correct < 6


def test_features_are_computed_once(
    pretrained: Path, data: DataConfig, tmp_path: Path, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import features

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("all features are kept")

    monkeypatch.setattr(features.VideoPredictor, "predict_many", refuse)
    again = open_frozen(open_model(pretrained), data.train, data.test, tmp_path / "cache", plan=PLAN)
    for one, two in zip(frozen.query_features, again.query_features, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(two))
    assert np.asarray(frozen.query_features[0]).shape[0] == 2


@pytest.fixture(scope="module")
def precisions(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of which three variants share one file of weights, as an export on a GPU makes it."""
    made = export_bundle(pretrained, tmp_path_factory.mktemp("precisions") / "bundle")
    whole, onnx = made.manifest.variants[:2]
    half = [
        replace(
            whole, id=f"torch-{one}", precision=one, derived_from=whole.id, parity=onnx.parity, build=LAYOUT
        )
        for one in HALVES
    ]
    write_manifest(made.path, replace(made.manifest, variants=(whole, onnx, *half)))
    return made.path


@pytest.mark.parametrize("precision", HALVES)
def test_features_of_one_precision_are_not_taken_for_those_of_another(
    precision: str, precisions: Path, data: DataConfig, tmp_path: Path
) -> None:
    def features(variant: str, cache: str) -> np.ndarray:
        model = open_model(precisions, variant=variant, device="cpu")
        made = open_frozen(model, data.train, data.test, tmp_path / cache, plan=PLAN)
        return np.stack([np.asarray(one) for one in made.query_features])

    alone = features(f"torch-{precision}", "alone")
    exact = features("torch-fp32", "both")
    other = features(f"torch-{precision}", "both")
    assert np.array_equal(other, alone)
    assert not np.array_equal(other, exact)
    assert np.array_equal(features("torch-fp32", "both"), exact)
    assert len(list((tmp_path / "both").iterdir())) == 2 * 22


def test_features_in_fp32_are_those_of_a_linear_probe(
    precisions: Path, pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    own = replace(data, cache=str(tmp_path / "cache"))
    finetune(finetune_config(tmp_path / "run", own, init=str(pretrained), linear_probe=True))
    kept = {file.name for file in (tmp_path / "cache").iterdir()}
    for path, variant in ((pretrained, None), (precisions, "torch-fp32")):
        model = open_model(path, variant=variant, device="cpu")
        open_frozen(model, data.train, data.test, tmp_path / "cache", plan=PLAN)
        assert {file.name for file in (tmp_path / "cache").iterdir()} == kept


def test_a_class_that_the_gallery_lacks_is_refused(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    lines = Path(data.train).read_text().splitlines()
    short = Path(data.train).with_name("only_up.csv")
    short.write_text("\n".join([lines[0], *(line for line in lines if line.endswith(",up"))]) + "\n")
    with pytest.raises(DataError, match="unknown to training: down"):
        open_frozen(open_model(pretrained), short, data.test, tmp_path / "cache")


def test_ten_clips_are_taken_unless_told_otherwise(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    made = open_frozen(open_model(pretrained), data.test, data.test, tmp_path / "cache")
    assert made.plan == ViewPlan(num_clips=10)
    assert np.asarray(made.gallery_features[0]).shape[0] == 10
    assert made.model.clip == CLIP
    same = retrieve(made)  # of a gallery that holds the query itself
    assert same.recalls[1].value == 1.0


def test_the_command_prints_the_recalls(
    pretrained: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(pretrained), "--data", data.test, "--gallery", data.train]
    words += ["--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "out"), "--json"]
    assert main([*words, "--protocol", "retrieval"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert set(report["recall_at"]) == {"1", "5", "10", "20", "50"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert f"wrote {tmp_path / 'out' / 'report.json'}" in printed.err
    assert printed.err.splitlines()[-1].startswith("retrieval: 6 queries in 16 videos, on 10 clips")
    assert main([*words, "--protocol", "linear-probe"]) == 0
    assert json.loads(capsys.readouterr().out)["video_accuracy"]["total"] == 6
    assert (tmp_path / "out" / "page.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "retrieval"], "--gallery goes with"),
        (["--gallery", "x.csv"], "--gallery goes with"),
        (["--protocol", "order", "--against", "x"], "--against compares accuracies"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "none.safetensors", "--data", "none.csv", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_without_features_is_refused(pretrained: Path, data: DataConfig, tmp_path: Path) -> None:
    model = module.replace(open_model(pretrained), output_names=("logits",))
    with pytest.raises(CheckpointError, match="gives no features"):
        open_frozen(model, data.train, data.test, tmp_path / "cache")
    assert read_video_list(data.test).items
