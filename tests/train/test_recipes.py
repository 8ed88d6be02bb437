"""The recipes of the paper: their settings, and small sets in the official layouts that train, test and retrieve."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint
from clips import moving_square
from videos import write_video

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import DataError
from train.__main__ import main
from train.config import AugmentConfig, FinetuneConfig, OptimConfig, PretrainConfig
from train.config_file import load_config
from train.dry_run import Needs, dry_run
from train.init import load_finetune_config
from train.method import DualConfig

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
SMALL = [
    "device=cpu", "bf16=false", "model.backbone=tiny", "model.clip_dim=16", "model.slot_dim=8", "clip.num_frames=4",
    "clip.frame_stride=3", "clip.short_side=36", "clip.crop_size=32", "optim.epochs=1", "optim.milestones=[]",
    "optim.batch_size=4", "log_every=1", "data.decode_workers=1", "view_plan.num_clips=2",
]  # fmt: skip
WAYS = {"ApplyEyeMakeup": "down", "YoYo": "up"}


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCF101 as it is published, with two of its classes: the index names three."""
    folder = tmp_path_factory.mktemp("ucf101")
    lists: dict[str, list[str]] = {"trainlist01.txt": [], "testlist01.txt": []}
    (folder / "lists").mkdir()
    (folder / "lists" / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n101 YoYo\n")
    for number, (label, way) in zip((1, 101), WAYS.items(), strict=True):
        for group in range(1, 5):
            name = f"{label}/v_{label}_g{group:02d}_c01.avi"
            path = folder / "UCF-101" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, moving_square(way, seed=10 * group + number), codec="mpeg4", bframes=0)
            if group == 1:
                lists["testlist01.txt"].append(name)  # without the number
            else:
                lists["trainlist01.txt"].append(f"{name} {number}")
    for name, lines in lists.items():
        (folder / "lists" / name).write_text("\r\n".join(lines) + "\r\n")
    return folder


@pytest.fixture(scope="module")
def hmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HMDB51 as it is published: one list a class, of which 0 is not used."""
    folder = tmp_path_factory.mktemp("hmdb51")
    (folder / "splits").mkdir()
    for label, way in (("brush_hair", "down"), ("wave", "up")):
        lines = []
        for number, use in enumerate((1, 1, 1, 2, 0)):
            name = f"clip{number}_{label}_u_nm_np1_ba_goo_0.avi"
            path = folder / "videos" / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, moving_square(way, seed=50 + number), codec="mpeg4", bframes=0)
            lines.append(f"{name} {use} ")
        for split, written in (
            (1, lines),
            (2, lines[:1]),
        ):  # of the second, the first list only knows one video
            (folder / "splits" / f"{label}_test_split{split}.txt").write_text("\n".join(written) + "\n")
    return folder


def ucf_lists(ucf: Path) -> dict[str, str]:
    return {
        "data.train": str(ucf / "lists" / "trainlist01.txt"),
        "data.test": str(ucf / "lists" / "testlist01.txt"),
        "data.root": str(ucf / "UCF-101"),
    }


def settings(**given: str) -> list[str]:
    return [*SMALL, *(f"{key}={value}" for key, value in given.items())]


SGD = OptimConfig(
    name="sgd", lr=0.003, momentum=0.9, weight_decay=1e-4, epochs=200, batch_size=64, accumulate=1, schedule="step",
    milestones=(120, 160), gamma=0.1, warmup_epochs=0.0,
)  # fmt: skip
AUGMENT = AugmentConfig(
    plain_probability=0.2, jitter_probability=0.64, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2,
    blur_probability=0.5, blur_sigma=(0.1, 2.0), flip_probability=0.0, reverse_probability=0.5,
)  # fmt: skip
DUAL = DualConfig(
    form="simclr", mode="clip-sr-tc", clip_weight=1.0, coherence_weight=1.0, rank_weight=1.0, clip_temperature=0.07,
    coherence_temperature=0.07, rank_theta=0.05, rank_clamp=5.0, rank_exclude_identity=False, rank_warmup_steps=0,
    bn_batches="reference", queue_length=16384, momentum=0.999, mask_same_video=False,
)  # fmt: skip
"""Every setting is written out, so that no default can change unseen."""


@pytest.mark.parametrize("name", ["pretrain", "ucf101_pretrain", "k400_pretrain"])
def test_the_settings_of_pretraining_are_those_of_the_paper(name: str) -> None:
    config = load_config(PretrainConfig, CONFIGS / f"{name}.toml")
    clip, model = config.clip, config.model
    assert (clip.num_frames, clip.frame_stride, clip.short_side, clip.crop_size) == (16, 4, 128, 112)
    assert (clip.mean, clip.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (model.backbone, model.head_norm) == ("r2plus1d_10", "none")
    assert (model.num_slots, model.slot_dim, model.clip_dim) == (2, 64, 128)
    assert config.optim == SGD
    assert config.augment == AUGMENT
    assert config.dual == DUAL
    moco = load_config(PretrainConfig, CONFIGS / f"{name}.toml", ["dual.form=moco"])
    assert moco.dual == replace(DUAL, form="moco", rank_clamp=0.0)
    assert (name == "pretrain") or config.view_plan.num_clips == 10


@pytest.mark.parametrize("name", ["finetune", "ucf101_finetune", "hmdb51_finetune"])
def test_the_settings_of_fine_tuning_are_those_of_the_paper(name: str) -> None:
    config = load_config(FinetuneConfig, CONFIGS / f"{name}.toml")
    clip, model = config.clip, config.model
    assert (clip.num_frames, clip.frame_stride, clip.short_side, clip.crop_size) == (16, 2, 128, 112)
    assert (model.backbone, model.dropout, config.dual_weight) == ("r2plus1d_10", 0.0, 0.0)
    assert config.optim == replace(
        SGD, lr=0.05, weight_decay=1e-3, epochs=100, milestones=(30, 60, 80), batch_size=16
    )
    assert config.augment == replace(
        AUGMENT, plain_probability=0.0, jitter_probability=0.8, blur_probability=0.0, flip_probability=0.5,
        reverse_probability=0.0,
    )  # fmt: skip
    assert (name == "finetune") or config.view_plan.num_clips == 10


def test_ucf101_trains_tests_and_retrieves_with_the_right_names(
    ucf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ucf_lists(ucf)
    pre = settings(
        **{key: value for key, value in lists.items() if key != "data.test"}, out=str(tmp_path / "pre")
    )
    assert main(["pretrain", "--config", str(CONFIGS / "ucf101_pretrain.toml"), *pre]) == 0
    init = str(tmp_path / "pre" / "checkpoint.safetensors")
    tune = settings(
        **lists, out=str(tmp_path / "ft"), init=init, **{"data.cache": str(tmp_path / "pre" / "cache")}
    )
    assert main(["finetune", "--config", str(CONFIGS / "ucf101_finetune.toml"), *tune]) == 0
    tuned = tmp_path / "ft" / "checkpoint.safetensors"
    info = load_checkpoint(tuned).info
    assert info.labels == ("ApplyEyeMakeup", "YoYo")
    assert info.provenance.metrics["test_videos"] == 2
    capsys.readouterr()
    measured = ["--data", lists["data.test"], "--root", lists["data.root"], "--json"]
    gallery = ["--gallery", lists["data.train"], "--cache", str(tmp_path / "features")]
    assert main(["evaluate", init, "--protocol", "retrieval", *gallery, *measured]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["queries"], found["gallery_videos"]) == (2, 6)
    assert main(["evaluate", str(tuned), "--protocol", "ten-clip", *measured]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["per_class"]) == ["ApplyEyeMakeup", "YoYo"]
    assert report["clip_accuracy"]["total"] == 20


def test_hmdb51_trains_tests_and_retrieves_on_its_parts_with_the_right_names(
    hmdb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = str(hmdb / "splits" / "*_test_split1.txt")
    given = {"data.train": lists, "data.test": lists, "data.root": str(hmdb / "videos")}
    tune = settings(**given, out=str(tmp_path / "ft"), init="")
    assert main(["finetune", "--config", str(CONFIGS / "hmdb51_finetune.toml"), *tune]) == 0
    tuned = tmp_path / "ft" / "checkpoint.safetensors"
    info = load_checkpoint(tuned).info
    assert info.labels == ("brush_hair", "wave")
    assert info.provenance.metrics["test_videos"] == 2
    assert "6 training videos" in capsys.readouterr().err
    measured = ["--data", lists, "--root", given["data.root"], "--json"]
    kept = ["--gallery", lists, "--cache", str(tmp_path / "features"), "-o", str(tmp_path / "found")]
    assert main(["evaluate", str(tuned), "--protocol", "retrieval", *kept, *measured]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["queries"], found["gallery_videos"]) == (
        2,
        6,
    )  # the part 2 asks, the part 1 answers, 0 neither
    assert found["recall_at"]["50"]["value"] == 1.0  # each class is in the gallery, under the same name
    assert main(["evaluate", str(tuned), "--protocol", "knn", *kept, *measured]) == 0
    assert list(json.loads(capsys.readouterr().out)["per_class"]) == ["brush_hair", "wave"]
    rows = [json.loads(line) for line in (tmp_path / "found" / "videos.jsonl").read_text().splitlines()]
    assert [(row["label"], Path(row["uri"]).name) for row in rows] == [
        ("brush_hair", "clip3_brush_hair_u_nm_np1_ba_goo_0.avi"), ("wave", "clip3_wave_u_nm_np1_ba_goo_0.avi")
    ]  # fmt: skip
    assert main(["evaluate", str(tuned), "--protocol", "ten-clip", *measured]) == 0
    assert json.loads(capsys.readouterr().out)["clip_accuracy"]["total"] == 20


# --- dry run


def needs(ucf: Path, tmp_path: Path, **given: str) -> Needs:
    words = settings(**ucf_lists(ucf) | {"out": str(tmp_path / "run"), "init": ""} | given)
    return dry_run(load_config(FinetuneConfig, CONFIGS / "ucf101_finetune.toml", words))


def test_a_dry_run_counts_and_measures_without_training(ucf: Path, tmp_path: Path) -> None:
    found = needs(ucf, tmp_path, **{"optim.epochs": "7"})
    assert (found.videos, found.others, found.classes) == (6, {"test": (2, ())}, 2)
    assert (found.steps, found.videos_per_step, found.clips_per_step) == (7, 4, 4)
    assert 0 < found.cache_bytes < 6 * 16 * 36 * 48 * 3
    raw = needs(ucf, tmp_path, **{"data.cache_form": "raw", "data.cache_gib": "1e-6"})
    assert raw.cache_bytes == 6 * 16 * 36 * 48 * 3
    assert "decoded again in every step" in "".join(raw.lines())
    assert found.missing == found.bad == ()
    assert found.clip_seconds > 0
    assert found.decode_seconds > 0
    assert not (tmp_path / "run").exists()


def test_activations_grow_with_the_clip_and_with_the_batch(ucf: Path, tmp_path: Path) -> None:
    small, long = needs(ucf, tmp_path), needs(ucf, tmp_path, **{"clip.num_frames": "8"})
    assert 1.5 < long.activation_bytes / small.activation_bytes < 2.5
    assert needs(ucf, tmp_path, **{"optim.batch_size": "2"}).activation_bytes == small.activation_bytes // 2
    assert long.state_bytes == small.state_bytes > 0


def test_a_step_of_pretraining_encodes_four_clips_a_video(ucf: Path, tmp_path: Path) -> None:
    words = settings(**ucf_lists(ucf) | {"data.test": ""}, out=str(tmp_path / "run"))
    found = dry_run(load_config(PretrainConfig, CONFIGS / "ucf101_pretrain.toml", words))
    assert (found.videos_per_step, found.clips_per_step) == (4, 16)


def test_a_dry_run_of_a_linear_probe_counts_features_and_no_steps(ucf: Path, tmp_path: Path) -> None:
    init = make_tiny_checkpoint(tmp_path / "tiny.safetensors")
    words = [f"{key}={value}" for key, value in ucf_lists(ucf).items()]
    found = dry_run(load_finetune_config(CONFIGS / "probe.toml", [*words, f"init={init}"]))
    assert found.features == (6 + 2) * 2
    said = "\n".join(found.lines())
    assert "the features of 16 clips are computed" in said
    assert "demo_finetune.toml needs, which is tried as well" in said
    for word in ("epochs", "steps", "cache", "backward"):
        assert word not in said
    assert found.clip_seconds > 0


def test_a_dry_run_may_come_before_the_pretraining_that_it_starts_from(
    ucf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(**ucf_lists(ucf), out=str(tmp_path / "run"), init=str(tmp_path / "pre.safetensors"))
    line = ["finetune", "--config", str(CONFIGS / "ucf101_finetune.toml"), *words]
    assert main([*line, "--dry-run"]) == 0
    assert f"init is not there yet: {tmp_path / 'pre.safetensors'}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(line)  # without it nothing is trained
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_training_refuses_and_makes_no_figure_of_nothing(
    ucf: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one.csv"
    one.write_text("path,label\na.avi,YoYo\nb.avi,YoYo\n")
    for name in "ab":
        (tmp_path / f"{name}.avi").write_bytes(b"no video")
    given = {"data.train": str(one), "data.test": "", "data.root": ""}
    with pytest.raises(DataError, match="one class only, 'YoYo'"):
        needs(ucf, tmp_path, **given)
    one.write_text("path,label\na.avi,YoYo\nb.avi,Archery\n")
    found = needs(ucf, tmp_path, **given)
    assert len(found.bad) == 2
    said = "\n".join(found.lines())
    assert "cache: unknown, since no video of the sample can be used" in said
    assert "GiB, filled" not in said


def test_a_dry_run_names_what_is_missing_or_bad(
    ucf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "UCF-101"
    for path in (ucf / "UCF-101").rglob("*.avi"):
        target = root / path.relative_to(ucf / "UCF-101")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (root / "YoYo" / "v_YoYo_g02_c01.avi").unlink()
    (root / "ApplyEyeMakeup" / "v_ApplyEyeMakeup_g02_c01.avi").write_bytes(b"no video")
    words = settings(**ucf_lists(ucf) | {"data.root": str(root)}, out=str(tmp_path / "run"), init="")
    line = ["finetune", "--config", str(CONFIGS / "ucf101_finetune.toml"), *words, "--dry-run"]
    assert main(line) == 1
    said = capsys.readouterr().err
    assert "6 videos, 1 missing: YoYo/v_YoYo_g02_c01.avi" in said
    assert "cannot be used: " in said
    assert said.splitlines()[-1] == "FAIL: nothing was trained, 2 videos are missing or cannot be used"
    assert not (tmp_path / "run").exists()


def test_a_wrong_root_is_said_with_the_place_that_was_looked_at(
    ucf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(**ucf_lists(ucf) | {"data.root": str(tmp_path / "nowhere")}, out=str(tmp_path), init="")
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(CONFIGS / "ucf101_finetune.toml"), *words, "--dry-run"])
    assert caught.value.code == 3
    assert f"the first would be {tmp_path / 'nowhere' / 'ApplyEyeMakeup'}" in capsys.readouterr().err
