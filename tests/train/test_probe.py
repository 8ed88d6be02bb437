"""The linear probe: features of a frozen backbone are computed once and kept, and a softmax regression is fitted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import TINY_CLIP, TINY_PLAN, make_tiny_checkpoint
from damage import damaged_bytes
from runs import finetune_config, state

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import DataError, FolderError, VideoOpenError
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video import PathSource
from ivdr_deploy.video.clips import load_clips
from train import features, probe, regression
from train import finetune as finetuning
from train.__main__ import main
from train.config import DataConfig, FinetuneConfig
from train.finetune import finetune
from train.init import load_finetune_config
from train.kept import kept_name


@pytest.fixture
def own(data: DataConfig, tmp_path: Path) -> DataConfig:
    """The lists with a cache of one test's own."""
    return replace(data, cache=str(tmp_path / "cache"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the videos whose features were computed, as they are."""
    names: list[str] = []
    predict_many = features.VideoPredictor.predict_many

    def counted(self, sources, **options):  # type: ignore[no-untyped-def]
        names.extend(source.path.name for source in sources)
        return predict_many(self, sources, **options)

    monkeypatch.setattr(features.VideoPredictor, "predict_many", counted)
    return names


def probe_config(out: Path, data: DataConfig, init: Path, **fields: object) -> FinetuneConfig:
    return finetune_config(out, data, init=str(init), linear_probe=True, **fields)


def opened(config: FinetuneConfig) -> probe.Probe:
    """The probe of a training list, with nothing held out."""
    return probe.open_probe(config, read_video_list(config.data.train), ("down", "up"), [])


def head(path: Path) -> np.ndarray:
    classifier = load_checkpoint(path).model.classifier
    assert classifier is not None
    return classifier.linear.weight.detach().numpy()


def test_features_are_computed_once(
    pretrained: Path, own: DataConfig, tmp_path: Path, computed: list[str]
) -> None:
    first = finetune(probe_config(tmp_path / "1", own, pretrained))
    assert (
        len(computed) == len(set(computed) | {"up0.mp4"}) + 6 == 16 + 6
    )  # the test list has some of the names
    kept = {file: file.stat().st_mtime_ns for file in Path(own.cache).iterdir()}
    assert len(kept) == 22
    computed.clear()
    second = finetune(probe_config(tmp_path / "2", own, pretrained))
    assert computed == []
    assert {file: file.stat().st_mtime_ns for file in Path(own.cache).iterdir()} == kept
    assert np.array_equal(head(first), head(second))


def test_what_a_feature_depends_on_is_computed_anew_and_the_rest_is_not(
    data: DataConfig, tmp_path: Path, computed: list[str]
) -> None:
    folder = Path(shutil.copytree(Path(data.train).parent, tmp_path / "videos"))
    own = DataConfig(train=str(folder / "list.csv"), cache=str(tmp_path / "cache"))
    weights = [make_tiny_checkpoint(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    model = load_checkpoint(weights[0]).info.model
    config = probe_config(
        tmp_path / "0", own, weights[0], model=replace(model, num_classes=0), clip=TINY_CLIP
    )
    changes: list[tuple[dict[str, object], int]] = [
        ({}, 16),
        ({"seed": 5, "log_every": 3}, 0),
        ({"init": str(weights[1])}, 16),
        ({"clip": replace(TINY_CLIP, frame_stride=1)}, 16),
        ({"view_plan": ViewPlan(num_clips=3)}, 16),
    ]
    for change, expected in changes:
        computed.clear()
        opened(replace(config, **change))
        assert len(computed) == expected, change
    computed.clear()
    shutil.copy(folder / "up3.mp4", folder / "down3.mp4")
    opened(config)
    assert computed == ["down3.mp4"]


def test_damaged_files_are_noticed_and_made_again(
    pretrained: Path, own: DataConfig, tmp_path: Path, computed: list[str]
) -> None:
    config = probe_config(tmp_path, own, pretrained)
    first = opened(config)
    files = sorted(Path(own.cache).iterdir())
    whole = [file.read_bytes() for file in files]
    flipped = bytearray(whole[0])
    flipped[-40] ^= 1  # in the last feature
    damaged = [bytes(flipped), b"", whole[4], *(damaged_bytes(whole[3], seed) for seed in range(3))]
    for file, broken in zip(files, damaged, strict=False):
        file.write_bytes(broken)
    computed.clear()
    second = opened(config)
    assert len(computed) == 6
    assert np.allclose(first.features, second.features, atol=1e-5)  # other neighbours in a call
    assert all(np.load(file).shape == (2, 96) for file in files)


def test_a_run_that_is_stopped_keeps_what_it_had(
    pretrained: Path, own: DataConfig, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = features._write, []

    def stops(file: Path, feature: np.ndarray) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        write(file, feature)
        written.append(file)

    config = probe_config(tmp_path / "out", own, pretrained)
    with monkeypatch.context() as patch:
        patch.setattr(features, "_write", stops)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert sorted(Path(own.cache).iterdir()) == sorted(written)
    computed.clear()
    finetune(config)  # the same run folder
    assert len(computed) == 22 - 5


def test_the_accuracy_that_is_reported_is_that_of_the_checkpoint(
    pretrained: Path, own: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = probe_config(tmp_path / "out", own, pretrained)
    path = finetune(config)
    capsys.readouterr()
    assert main(["evaluate", str(path), "--videos", own.test, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    metrics = load_checkpoint(path).info.provenance.metrics
    assert report["video_accuracy"]["value"] == metrics["video_accuracy"]
    assert report["clip_accuracy"]["value"] == metrics["clip_accuracy"]
    assert metrics["test_videos"] == 6
    assert metrics["held_out_videos"] == 16
    assert 0.0 <= metrics["held_out_accuracy"] <= 1.0
    assert metrics["penalty"] in regression.PENALTIES
    kept = opened(config)
    targets = [int(item.label == "up") for item in kept.items]
    linear = regression.fit(kept.features, targets, num_classes=2, penalty=metrics["penalty"])
    written = state(path, "classifier")
    assert np.allclose(written["linear.weight"], linear.weight, atol=1e-5)
    assert np.allclose(written["linear.bias"], linear.bias, atol=1e-5)
    assert np.abs(linear.bias).max() > 1e-3


def test_a_test_video_that_fails_counts_as_wrong(
    pretrained: Path, own: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    path = tmp_path / "test.csv"
    path.write_text(f"path,label\n{bad},up\n{Path(own.train).parent / 'up0.mp4'},up\n")
    made = finetune(probe_config(tmp_path / "out", replace(own, test=str(path)), pretrained))
    metrics = load_checkpoint(made).info.provenance.metrics
    assert (metrics["test_videos"], metrics["test_videos_failed"]) == (2, 1)
    assert metrics["video_accuracy"] <= 0.5
    assert "bad.mp4" in "".join(capsys.readouterr().err.split())  # the console wraps a long path
    path.write_text(path.read_text() + f"{Path(own.train).parent / 'down0.mp4'},down\n")
    with pytest.raises(DataError, match=r"1 of 3 videos cannot be used \(.*bad\.mp4"):
        finetune(probe_config(tmp_path / "o", replace(own, train=str(path), test=""), pretrained))


def test_a_run_folder_with_another_training_is_left_alone(
    pretrained: Path, own: DataConfig, tmp_path: Path
) -> None:
    config = probe_config(tmp_path, own, pretrained)
    (tmp_path / "state-00000003.pt").write_bytes(b"of another run")
    with pytest.raises(FolderError, match="holds the state of another run"):
        finetune(config)
    (tmp_path / "state-00000003.pt").unlink()
    finetune(config)
    with pytest.raises(FolderError, match="is used"):
        finetune(config)


def test_a_bundle_gives_contract_network_and_its_quickest_engine(
    tiny_bundle: Path, own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "probe.toml"
    settings.write_text(
        f'out = "{tmp_path / "out"}"\ninit = "{tiny_bundle}"\nlinear_probe = true\n'
        f'[data]\ntrain = "{own.train}"\ncache = "{own.cache}"\n[view_plan]\nplacement = "uniform"\n'
    )
    config = load_finetune_config(settings, ["clip.frame_stride=1"])
    assert (config.clip, config.view_plan) == (replace(TINY_CLIP, frame_stride=1), TINY_PLAN)
    assert (config.model.backbone, config.model.slot_dim, config.model.num_classes) == ("tiny", 8, 0)
    variants = []

    def noted(path: Path, **options: object):  # type: ignore[no-untyped-def]
        variants.append(options["variant"])
        return open_model(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "open_model", noted)
    finetune(config)  # torch: the bundle's ONNX file was made for another contract
    assert variants == []
    path = finetune(replace(load_finetune_config(settings), out=str(tmp_path / "second")))
    assert variants == ["onnx-fp32"]
    info = load_checkpoint(path).info
    assert (info.clip, info.view_plan, info.labels) == (TINY_CLIP, TINY_PLAN, ("down", "up"))
    videos = read_video_list(own.train)
    with open_model(tiny_bundle, variant="torch-fp32").runtime as runtime:
        clips = load_clips(videos.items[0].path, TINY_CLIP, TINY_PLAN).video
        expected = runtime.infer(clips)["feature"]
    kept = [np.load(file) for file in Path(own.cache).iterdir()]
    assert min(np.abs(feature - expected).max() for feature in kept) < 1e-5


# --- the regression


def planted(
    rng: np.random.Generator, *, count: int, noise: float, useless: int
) -> tuple[list[np.ndarray], list[int]]:
    """Features of two clips a video in which the class shows in one place, among places of noise."""
    targets = [row % 2 for row in range(count)]
    shown = [
        np.concatenate(
            [np.full((2, 1), target) + noise * rng.normal(size=(2, 1)), rng.normal(size=(2, useless))], axis=1
        ).astype(np.float32)
        for target in targets
    ]
    return shown, targets


def test_the_fit_is_the_optimum_of_the_scaled_features() -> None:
    rng = np.random.default_rng(0)
    shown = [3.0 + 40.0 * rng.normal(size=(1 + row % 3, 5)) * [1, 1e-3, 1, 10, 1] for row in range(30)]
    targets, penalty = [row % 3 for row in range(30)], 0.03
    linear = regression.fit(shown, targets, num_classes=3, penalty=penalty)
    stacked = np.concatenate(shown)
    variance = stacked.var(axis=0)
    scale = np.sqrt(variance + 1e-4 * variance.mean())
    weight = linear.weight * scale
    gradient = penalty * weight
    for feature, target in zip(shown, targets, strict=True):
        error = softmax(linear.logits(feature)) - np.eye(3)[target]
        gradient += (error.T @ ((feature - stacked.mean(axis=0)) / scale)) / len(feature) / 30
    assert np.abs(gradient).max() < 1e-5
    assert np.abs(weight).max() > 0.01


def test_a_feature_that_never_changes_has_no_say() -> None:
    rng = np.random.default_rng(0)
    shown, targets = planted(rng, count=12, noise=0.1, useless=2)
    for feature in shown:
        feature[:, 1] = 7.0
    linear = regression.fit(shown, targets, num_classes=2, penalty=0.01)
    assert np.isfinite(linear.weight).all()
    assert np.abs(linear.weight[:, 1]).max() < 1e-9


def test_the_penalty_is_the_one_that_serves_held_out_videos() -> None:
    rng = np.random.default_rng(0)
    parts = [np.arange(start, 30, 3) for start in range(3)]
    clear, targets = planted(rng, count=30, noise=0.05, useless=1)
    noisy, _ = planted(rng, count=30, noise=3.0, useless=40)
    low, right = regression.choose_penalty(clear, targets, parts, num_classes=2)
    high, wrong = regression.choose_penalty(noisy, targets, parts, num_classes=2)
    assert low < high
    assert right.correct == right.total == wrong.total == 30
    assert wrong.correct < 30
    assert regression.choose_penalty(clear, targets, [], num_classes=2)[1].total == 0


def test_a_feature_belongs_to_a_video_as_it_was(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"one")
    os.utime(video, ns=(5, 5))
    name = kept_name(PathSource(video), {"feature": "w"})
    assert kept_name(PathSource(video), {"feature": "w"}) == name
    assert kept_name(PathSource(video), {"feature": "v"}) != name
    os.utime(video, ns=(6, 6))  # another of the same size, written later
    assert kept_name(PathSource(video), {"feature": "w"}) != name
    video.write_bytes(b"longer")
    os.utime(video, ns=(5, 5))
    assert kept_name(PathSource(video), {"feature": "w"}) != name


def test_what_is_held_out_depends_on_the_seed_of_the_run(
    pretrained: Path, own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    open_probe = finetuning.open_probe

    def noted(config, videos, labels, parts):  # type: ignore[no-untyped-def]
        held.append([part.tolist() for part in parts])
        return open_probe(config, videos, labels, parts)

    monkeypatch.setattr(finetuning, "open_probe", noted)
    for number, seed in enumerate((0, 1, 0)):
        finetune(probe_config(tmp_path / str(number), own, pretrained, seed=seed))
    one, other, again = held
    assert one == again
    assert one != other


def test_held_out_videos_of_which_none_can_be_used_choose_nothing() -> None:
    shown, targets = planted(np.random.default_rng(0), count=6, noise=1.0, useless=1)
    made = [*shown[:4], VideoOpenError("broken"), VideoOpenError("broken")]
    penalty, accuracy = regression.choose_penalty(made, targets, [np.array([4, 5])], num_classes=2)
    assert (penalty, accuracy.correct, accuracy.total) == (0.01, 0, 2)


def test_held_out_videos_are_not_in_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, targets = planted(np.random.default_rng(0), count=9, noise=1.0, useless=1)
    given = []
    fit = regression.fit

    def noted(rows, *args, **options):  # type: ignore[no-untyped-def]
        given.append({id(row) for row in rows})
        return fit(rows, *args, **options)

    monkeypatch.setattr(regression, "fit", noted)
    parts = [np.array([0, 1, 2]), np.array([3, 4])]
    regression.choose_penalty(shown, targets, parts, num_classes=2)
    expected = [{id(row) for at, row in enumerate(shown) if at not in part} for part in parts]
    assert given == expected * len(regression.PENALTIES)
