"""Pre-training, fine-tuning and evaluation, run for real on small videos."""

import csv
import json
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import write_set

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from ivdr_deploy.spec import ClipSpec, ModelSpec
from train.__main__ import main
from train.config import AugmentConfig, DataConfig, DualConfig, FinetuneConfig, OptimConfig, PretrainConfig
from train.evaluate import evaluate
from train.finetune import finetune
from train.pretrain import pretrain

CLIP = ClipSpec(num_frames=4, frame_stride=3, num_clips=2, short_side=36, crop_size=32)
MODEL = ModelSpec(backbone="tiny", clip_dim=16, slot_dim=8)
HEADS = ("clip_head", "series_head", "classifier")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    train, test = write_set(folder / "train", per_class=8), write_set(folder / "test", per_class=3, seed=99)
    return DataConfig(train=str(train), test=str(test), cache=str(folder / "cache"))


def pretrain_config(out: Path, data: DataConfig, **fields: object) -> PretrainConfig:
    optim = OptimConfig(name="adamw", lr=1e-3, epochs=2, batch_size=8, schedule="cosine")
    base = PretrainConfig(out=str(out), data=data, clip=CLIP, model=MODEL, optim=optim, log_every=1)
    return replace(base, **fields)  # type: ignore[arg-type]


def finetune_config(out: Path, data: DataConfig, **fields: object) -> FinetuneConfig:
    optim = OptimConfig(name="adamw", lr=1e-3, epochs=1, batch_size=8, schedule="cosine")
    base = FinetuneConfig(out=str(out), data=data, clip=CLIP, model=MODEL, optim=optim, log_every=1)
    return replace(base, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> Path:
    return pretrain(pretrain_config(tmp_path_factory.mktemp("pretrain"), data))


def state(path: Path, part: str) -> dict[str, torch.Tensor]:
    return dict(getattr(load_checkpoint(path).model, part).state_dict())


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


# --- pre-training


def test_pretraining_leaves_a_checkpoint_that_says_what_it_is(pretrained: Path, data: DataConfig) -> None:
    checkpoint = load_checkpoint(pretrained)
    info = checkpoint.info
    assert info.clip == CLIP
    assert info.model == MODEL
    assert info.labels == ()
    assert info.training.backbone_step == 4  # 16 videos in batches of 8, twice
    assert info.training.valid_outputs() == ("feature", "inter", "intra")
    assert checkpoint.golden.shape == (4, *CLIP.clip_shape)
    provenance = info.provenance
    assert provenance.seed == 0
    assert len(provenance.data_hash) == 64
    assert provenance.packages["torch"] == metadata.version("torch")
    assert provenance.config["data"]["train"] == data.train
    assert provenance.metrics["loss"] > 0


def test_pretraining_logs_every_step_to_csv_and_tensorboard(pretrained: Path) -> None:
    rows = list(csv.DictReader((pretrained.parent / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() >= {
        "loss", "loss_clip", "loss_coherence", "loss_rank_cross", "loss_rank_same", "clip_top1", "rank_accuracy",
        "slot_cosine", "clamped_share", "inter_norm", "lr",
    }  # fmt: skip
    for row in rows:
        parts = [float(row[name]) for name in ("loss_clip", "loss_coherence")]
        parts += [0.5 * float(row[name]) for name in ("loss_rank_cross", "loss_rank_same")]
        assert float(row["loss"]) == pytest.approx(sum(parts), rel=1e-4)
    assert list(pretrained.parent.glob("tensorboard/*/events.out.tfevents.*"))


def test_same_seed_gives_the_same_weights_and_another_seed_others(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    again = pretrain(pretrain_config(tmp_path / "again", data))
    other = pretrain(pretrain_config(tmp_path / "other", data, seed=1))
    assert equal(state(pretrained, "backbone"), state(again, "backbone"))
    assert not equal(state(pretrained, "backbone"), state(other, "backbone"))


def test_losses_without_weight_leave_their_heads_untrained(data: DataConfig, tmp_path: Path) -> None:
    path = pretrain(pretrain_config(tmp_path, data, dual=DualConfig(coherence_weight=0.0, rank_weight=0.0)))
    assert load_checkpoint(path).info.training.valid_outputs() == ("feature",)


def test_paper_augmentation_bf16_and_three_slots_run(data: DataConfig, tmp_path: Path) -> None:
    augment = AugmentConfig(plain_probability=0.2, blur_probability=0.5, reverse_probability=0.5)
    config = pretrain_config(
        tmp_path,
        data,
        augment=augment,
        bf16=True,
        clip=replace(CLIP, num_frames=6),
        model=replace(MODEL, num_slots=3),
    )
    path = pretrain(replace(config, optim=replace(config.optim, epochs=1)))
    assert np.isfinite(load_checkpoint(path).info.provenance.metrics["loss"])


def test_training_that_diverges_stops_with_an_error_and_no_checkpoint(
    data: DataConfig, tmp_path: Path
) -> None:
    config = pretrain_config(tmp_path, data)
    with pytest.raises(ConfigError, match="the loss is nan"):
        pretrain(replace(config, optim=replace(config.optim, name="sgd", lr=1e30, epochs=4)))
    assert not list(tmp_path.glob("*.safetensors"))


def test_missing_tensorboard_is_named(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        pretrain(pretrain_config(tmp_path, data))


# --- fine-tuning


def test_cross_entropy_alone_makes_the_other_heads_stale(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained)))
    info = load_checkpoint(path).info
    assert info.labels == ("down", "up")
    assert info.training.backbone_step == 4 + 2
    assert info.training.head_steps == {"clip_head": 4, "series_head": 4, "classifier": 6}
    assert info.training.valid_outputs() == ("logits", "feature")
    assert not equal(state(path, "backbone"), state(pretrained, "backbone"))
    assert equal(state(path, "series_head"), state(pretrained, "series_head"))
    assert 0.0 <= info.provenance.metrics["video_accuracy"] <= 1.0


def test_joint_training_keeps_all_heads_valid(pretrained: Path, data: DataConfig, tmp_path: Path) -> None:
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained), dual_weight=0.1))
    info = load_checkpoint(path).info
    assert all(info.training.is_valid(head) for head in HEADS)
    assert info.training.valid_outputs() == ("logits", "feature", "inter", "intra")
    assert not equal(state(path, "series_head"), state(pretrained, "series_head"))


def test_a_classifier_for_the_same_labels_is_carried_into_the_next_stage(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    first = finetune(finetune_config(tmp_path / "first", data, init=str(pretrained)))
    still = OptimConfig(name="sgd", lr=0.0, epochs=1, batch_size=8)  # what was carried over is what is saved
    second = finetune(
        finetune_config(tmp_path / "second", data, init=str(first), dual_weight=0.1, optim=still)
    )
    assert equal(state(first, "classifier"), state(second, "classifier"))
    assert load_checkpoint(second).info.training.valid_outputs() == ("logits", "feature", "inter", "intra")


def test_linear_probe_trains_the_classifier_alone(pretrained: Path, data: DataConfig, tmp_path: Path) -> None:
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained), linear_probe=True))
    info = load_checkpoint(path).info
    assert info.training.backbone_step == 4
    assert all(info.training.is_valid(head) for head in HEADS)
    assert equal(state(path, "backbone"), state(pretrained, "backbone"))  # batch statistics too
    assert equal(state(path, "series_head"), state(pretrained, "series_head"))
    assert state(path, "classifier")["linear.bias"].any()


def test_training_from_scratch_has_no_valid_dual_heads(data: DataConfig, tmp_path: Path) -> None:
    info = load_checkpoint(finetune(finetune_config(tmp_path, data))).info
    assert info.training.backbone_step == 2
    assert info.training.valid_outputs() == ("logits", "feature")


def test_motion_is_learned_and_evaluated_on_other_videos(data: DataConfig, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, data, augment=AugmentConfig(jitter_probability=0.0))
    optim = replace(config.optim, epochs=15, lr=3e-3)
    path = finetune(replace(config, optim=optim, log_every=100))
    report = evaluate(path, data.test)
    assert report.num_clips == 10
    assert report.video_accuracy.total == 6
    assert report.video_accuracy.correct == 6
    assert report.clip_accuracy.total == 60
    assert {label: accuracy.total for label, accuracy in report.per_class.items()} == {"down": 3, "up": 3}
    assert load_checkpoint(path).info.provenance.metrics["video_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": replace(MODEL, slot_dim=4)}, "model.slot_dim: 8 != 4"),
        ({"clip": replace(CLIP, num_frames=8)}, "clip.num_frames: 4 != 8"),
        ({"clip": replace(CLIP, mean=(0.5, 0.5, 0.5))}, "clip.mean"),
    ],
)
def test_checkpoint_of_another_network_or_contract_is_refused(
    pretrained: Path, data: DataConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        finetune(finetune_config(tmp_path, data, init=str(pretrained), **changes))


def test_stride_and_size_may_change_between_the_stages(
    pretrained: Path, data: DataConfig, tmp_path: Path
) -> None:
    clip = replace(CLIP, frame_stride=2, crop_size=24)
    path = finetune(finetune_config(tmp_path, data, init=str(pretrained), clip=clip))
    assert load_checkpoint(path).info.clip == clip


# --- bad lists


def rewrite(source: str, path: Path, **labels: str) -> DataConfig:
    """A training list next to its videos, and a copy of it as test list with some labels changed."""
    rows = list(csv.DictReader(Path(source).read_text().splitlines()))
    lines = [
        f"{Path(source).parent / row['path']},{labels.get(Path(row['path']).stem, row['label'])}"
        for row in rows
    ]
    path.write_text("path,label\n" + "\n".join(lines) + "\n")
    return DataConfig(train=source, test=str(path))


def test_class_that_only_the_test_list_has_is_refused_by_name(data: DataConfig, tmp_path: Path) -> None:
    lists = rewrite(data.train, tmp_path / "test.csv", down0="sideways")
    with pytest.raises(DataError, match="unknown to training: sideways"):
        finetune(finetune_config(tmp_path, lists))


def test_video_without_a_label_is_refused_by_name(data: DataConfig, tmp_path: Path) -> None:
    lists = rewrite(data.train, tmp_path / "test.csv", down0="")
    with pytest.raises(DataError, match=r"1 of 16 videos have no label: .*down0\.mp4"):
        finetune(finetune_config(tmp_path, replace(lists, train=lists.test, test="")))


def test_single_class_is_refused(data: DataConfig, tmp_path: Path) -> None:
    lists = rewrite(data.train, tmp_path / "l.csv", **{f"up{i}": "down" for i in range(8)})
    with pytest.raises(DataError, match="one class only, 'down'"):
        finetune(finetune_config(tmp_path, replace(lists, train=lists.test, test="")))


# --- evaluation


def test_checkpoint_without_a_classifier_cannot_be_evaluated(pretrained: Path, data: DataConfig) -> None:
    with pytest.raises(CheckpointError, match="no classifier"):
        evaluate(pretrained, data.test)


def test_bad_test_video_is_reported_and_counts_in_no_accuracy(data: DataConfig, tmp_path: Path) -> None:
    path = finetune(finetune_config(tmp_path / "run", replace(data, test="")))
    lists = rewrite(data.test, tmp_path / "test.csv")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with Path(lists.test).open("a") as stream:
        stream.write("broken.mp4,up\n")
    report = evaluate(path, lists.test)
    assert [uri for uri, _ in report.failed] == ["broken.mp4"]
    assert report.video_accuracy.total == 6
    assert report.to_dict()["failed"][0]["uri"] == "broken.mp4"


# --- command line


def test_commands_chain_and_evaluate_prints_json(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        "log_every = 1\n[clip]\nnum_frames = 4\nnum_clips = 2\nshort_side = 36\ncrop_size = 32\n"
        '[model]\nbackbone = "tiny"\n[optim]\nepochs = 1\nbatch_size = 8\n'
    )
    lists = [f"data.train={data.train}", f"data.cache={data.cache}"]
    first, second = tmp_path / "a", tmp_path / "b"
    assert main(["pretrain", "--config", str(config), f"out={first}", *lists]) == 0
    init = f"init={first / 'checkpoint.safetensors'}"
    assert main(["finetune", "--config", str(config), f"out={second}", init, *lists]) == 0
    capsys.readouterr()
    checkpoint = str(second / "checkpoint.safetensors")
    assert main(["evaluate", checkpoint, "--protocol", "ten-clip", "--data", data.test, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["video_accuracy"]["total"] == 6
    assert set(report["per_class"]) == {"down", "up"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "--config", "none.toml"], 2, "no config file at none.toml"),
        (["finetune", "--config", "train/configs/demo_finetune.toml", "optim.lrr=1"], 2, "did you mean 'lr'"),
        (
            ["finetune", "--config", "train/configs/demo_finetune.toml", "data.train=none.csv"],
            3,
            "no list of videos at none.csv",
        ),
        (["evaluate", "none.safetensors", "--data", "none.csv"], 5, "no checkpoint at none.safetensors"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train: ")
    assert message in last
