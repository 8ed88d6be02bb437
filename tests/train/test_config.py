"""Settings: files, overrides, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import ViewPlan
from train.config import FinetuneConfig, PretrainConfig, RunConfig
from train.config_file import changed_settings, load_config, settings_toml
from train.method import DualConfig

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, 'out = "runs/x"\n[data]\ntrain = "train.csv"\n[optim]\nlr = 0.5\n')


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    cls: type[RunConfig] = PretrainConfig if "pretrain" in path.stem else FinetuneConfig
    assert load_config(cls, path).data.train


def test_pretrain_config_is_the_papers_recipe() -> None:
    config = load_config(PretrainConfig, CONFIGS / "pretrain.toml")
    optim, clip, dual = config.optim, config.clip, config.dual
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.003, 0.9, 1e-4)
    assert (optim.epochs, optim.batch_size, optim.milestones, optim.warmup_epochs) == (200, 64, (120, 160), 0)
    assert (clip.num_frames, clip.frame_stride, clip.crop_size) == (16, 4, 112)
    assert (dual.clip_temperature, dual.coherence_temperature, dual.rank_theta, dual.rank_clamp) == (
        0.07, 0.07, 0.05, 5.0
    )  # fmt: skip
    assert (config.model.backbone, config.model.num_slots, config.model.clip_dim, config.model.slot_dim) == (
        "r2plus1d_10", 2, 128, 64
    )  # fmt: skip


def test_a_queue_holds_the_keys_of_one_step_at_least(minimal: Path) -> None:
    given = ["dual.form=moco", "dual.queue_length=32", "optim.batch_size=32"]
    assert load_config(PretrainConfig, minimal, given).dual.queue_length == 32
    with pytest.raises(ConfigError, match=r"queue_length 32 does not hold the keys of one step"):
        load_config(PretrainConfig, minimal, [*given, "optim.batch_size=34"])


def test_presets_are_named_sets_and_what_is_given_wins(minimal: Path) -> None:
    recipe = load_config(PretrainConfig, minimal)
    assert recipe == load_config(PretrainConfig, minimal, ["preset=ivdr"])
    assert (recipe.model.head_norm, recipe.dual) == ("series", DualConfig())
    assert recipe.dual == DualConfig(
        form="simclr", mode="clip-sr-tc", clip_weight=1.0, coherence_weight=1.0, rank_weight=3.0, clip_temperature=0.07,
        coherence_temperature=0.07, rank_theta=0.05, rank_clamp=0.0, rank_exclude_identity=True, rank_warmup_steps=0,
        bn_batches="joint", queue_length=4096, momentum=0.999, mask_same_video=True,
    )  # fmt: skip
    paper = load_config(PretrainConfig, minimal, ["preset=paper"])
    assert (paper.model.head_norm, paper.dual.rank_weight, paper.dual.rank_clamp) == ("none", 1.0, 5.0)
    assert (paper.dual.rank_exclude_identity, paper.dual.bn_batches) == (False, "reference")
    moco = ["preset=paper", "dual.form=moco"]
    assert load_config(PretrainConfig, minimal, moco).dual.rank_clamp == 0.0
    assert load_config(PretrainConfig, minimal, [*moco, "dual.rank_clamp=5"]).dual.rank_clamp == 5.0
    given = load_config(
        PretrainConfig, minimal, ["preset=paper", "model.head_norm=both", "dual.rank_clamp=2"]
    )
    assert (given.model.head_norm, given.dual.rank_clamp) == ("both", 2.0)


def test_overrides_beat_the_file_which_beats_the_default(minimal: Path) -> None:
    config = load_config(FinetuneConfig, minimal, ["optim.momentum=0.5", "optim.lr=1e-3"])
    assert (config.optim.lr, config.optim.momentum, config.optim.epochs) == (1e-3, 0.5, 200)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.train=/a b/train.csv", lambda config: config.data.train == "/a b/train.csv"),
        ("data.train=x=y.csv", lambda config: config.data.train == "x=y.csv"),
        ("linear_probe=false", lambda config: config.linear_probe is False),
        ("optim.milestones=[3, 5]", lambda config: config.optim.milestones == (3, 5)),
        ('optim.name="adamw"', lambda config: config.optim.name == "adamw"),
        ("optim.name=adamw", lambda config: config.optim.name == "adamw"),
        ("clip.target_fps=12.5", lambda config: config.clip.target_fps == 12.5),
        ("out=2024", lambda config: config.out == "2024"),
        ("out=2024-11-23", lambda config: config.out == "2024-11-23"),
        ("out=true", lambda config: config.out == "true"),
        ("out=[a]", lambda config: config.out == "[a]"),
        ("out=1e3", lambda config: config.out == "1e3"),
        ('out="2024"', lambda config: config.out == "2024"),
        ("data.train=1", lambda config: config.data.train == "1"),
        ("data.cache=0x10", lambda config: config.data.cache == "0x10"),
        ("init=7", lambda config: config.init == "7"),
        ("view_plan.spatial_crops=3", lambda config: config.view_plan == ViewPlan(spatial_crops=3)),
    ],
)
def test_override_values_follow_the_type_of_the_setting(minimal: Path, override: str, read) -> None:  # type: ignore[no-untyped-def]
    assert read(load_config(FinetuneConfig, minimal, [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preset=papr", "preset: expected one of ivdr, paper, found 'papr'"),
        ("dual.queue_length=1000000000000", "queue_length must be between 2 and 10000000"),
        ("dual.mode=sr", "mode: expected one of 'clip', 'clip-sr'"),
        ("dual.momentum=1.5", "momentum must be between 0.0 and 1.0"),
        ("optim.momntum=1", r"unknown key 'momntum'.* did you mean 'momentum'"),
        ("optimm.lr=1", r"unknown key 'optimm'.* did you mean 'optim'"),
        ("optim.lr=fast", "lr: expected float, found 'fast'"),
        ("optim.lr=-1", "lr must be at least 0"),
        ("optim.lr=inf", "lr must be at least 0.*, found inf"),
        ("optim.lr=nan", "lr must be at least 0.*, found nan"),
        ("optim.momentum=-0.1", "momentum must be between 0.0 and 1.0"),
        ("optim.weight_decay=-1e-4", "weight_decay must be at least 0"),
        ("optim.gamma=nan", "gamma must be between 0.0 and 1.0, found nan"),
        ("optim.gamma=1e200", "gamma must be between 0.0 and 1.0"),
        ("log_every=" + "9" * 400, "log_every must be at least 1, found 999"),
        ("seed=" + "9" * 400, "seed must be between 0 and 4294967295, found 999"),
        ("validate_every=1e308", "validate_every must be between 0.001 and 1000000.0"),
        ("patience=2", "patience 2 counts measurements on data.validation, and there is no such list"),
        ("optim.milestones=[-1]", "milestones must be at least 0"),
        ("seed=4294967296", "seed must be between 0 and 4294967295"),
        ("optim.epochs=0", "epochs must be at least 1"),
        ("optim.batch_size=1", "batch_size must be at least 2"),
        ("optim.name=lion", "expected one of 'sgd', 'adamw', found 'lion'"),
        ("optim.lr.x=1", "'lr' is a value"),
        ("optim.lr", "is not a setting"),
        ("=1", "is not a setting"),
        ("seed=" + "9" * 5000, "seed: expected int"),
        ("optim.milestones=" + "[" * 5000, "milestones: expected a list"),
        ("augment.hue=0.7", "hue must be between 0.0 and 0.5"),
        ("augment.blur_sigma=[2.0, 1.0]", "blur_sigma"),
        ("augment.blur_sigma=[0.1, inf]", "blur_sigma must be two growing positive numbers"),
        ("model.num_slots=3", r"num_slots 3 does not divide clip.num_frames 16"),
        ("model.num_classes=4", "num_classes is not a setting"),
        ("augment.reverse_probability=0.5", "reverse_probability must be 0"),
        ("linear_probe=true", "linear_probe needs a trained backbone"),
        ("clip.crop_size=500", "crop_size 500 is larger than the resized frame"),
        ("clip.num_clips=5", "unknown key 'num_clips'"),
        ("view_plan.num_clips=0", "num_clips must be between 1 and"),
        ("data.decode_workers=0", "decode_workers must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(FinetuneConfig, minimal, [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_probe_and_joint_training_exclude_each_other(minimal: Path) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        load_config(FinetuneConfig, minimal, ["linear_probe=true", "init=a.safetensors", "dual_weight=0.1"])


@pytest.mark.parametrize("name", ["test", "validation"])
def test_pretraining_has_no_part_for_other_lists_and_says_so(minimal: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no part for data.{name}, found 'more.csv'"):
        load_config(PretrainConfig, minimal, [f"data.{name}=more.csv"])
    assert load_config(FinetuneConfig, minimal, [f"data.{name}=more.csv"]).data


def test_ranking_needs_two_slots_unless_it_is_off(minimal: Path) -> None:
    with pytest.raises(ConfigError, match="num_slots must be at least 2"):
        load_config(PretrainConfig, minimal, ["model.num_slots=1"])
    assert (
        load_config(PretrainConfig, minimal, ["model.num_slots=1", "dual.mode=clip-tc"]).model.num_slots == 1
    )


@pytest.mark.parametrize("override", ["model.clip_dim=0", "model.num_slots=0"])
def test_heads_may_be_left_out_where_no_dual_loss_is_trained(minimal: Path, override: str) -> None:
    load_config(FinetuneConfig, minimal, [override])
    with pytest.raises(ConfigError, match="is 0, and the dual losses train the head"):
        load_config(PretrainConfig, minimal, [override])
    with pytest.raises(ConfigError, match="is 0, and the dual losses train the head"):
        load_config(FinetuneConfig, minimal, [override, "dual_weight=0.1"])


def test_missing_key_missing_file_and_bad_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file at .*none"):
        load_config(PretrainConfig, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="the key 'data' is missing"):
        load_config(PretrainConfig, write(tmp_path, 'out = "x"'))
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(PretrainConfig, write(tmp_path, "out = "))


def test_only_losses_with_a_weight_train_their_heads() -> None:
    config = load_config(PretrainConfig, CONFIGS / "pretrain.toml", ["dual.clip_weight=0"])
    assert config.dual.trained_heads == ("series_head",)


def test_a_tilde_is_the_home_folder_in_file_and_overrides(
    minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    overrides = [
        "out=~/run",
        "data.cache=~/cache",
        "init=~/c.safetensors",
        "data.train=~/l.csv",
        "data.root=~",
    ]
    config = load_config(FinetuneConfig, minimal, overrides)
    data = config.data
    assert (config.out, config.cache_dir) == ("/home/someone/run", Path("/home/someone/cache"))
    assert (config.init, data.train, data.root) == (
        "/home/someone/c.safetensors", "/home/someone/l.csv", "/home/someone"
    )  # fmt: skip
    path = write(minimal.parent, 'out = "~/x"\n[data]\ntrain = "~/videos"\n')
    assert load_config(PretrainConfig, path).out == "/home/someone/x"


def test_an_unknown_container_is_refused(minimal: Path) -> None:
    assert load_config(FinetuneConfig, minimal, ['data.allow_containers=["asf"]']).data.allow_containers == (
        "asf",
    )
    with pytest.raises(ConfigError, match="wmv"):
        load_config(FinetuneConfig, minimal, ['data.allow_containers=["wmv"]'])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_settings_are_written_as_a_file_that_gives_them_again(path: Path, tmp_path: Path) -> None:
    cls: type[RunConfig] = PretrainConfig if "pretrain" in path.stem else FinetuneConfig
    config = load_config(
        cls, path, ['out=a "b" \\ é \U0001f600 \x7f', "clip.target_fps=12.5", "optim.milestones=[3, 5]"]
    )
    assert load_config(cls, write(tmp_path, settings_toml(config))) == config
    deep = replace(
        config, model=replace(config.model, backbone_config={"hidden \U0001f600": 8, "scales": [1, "\x85"]})
    )
    assert load_config(cls, write(tmp_path, settings_toml(deep))) == deep


def test_settings_shown_are_those_that_differ_and_can_be_given_again(minimal: Path) -> None:
    given = ["optim.milestones=[3, 5]", "init=my run", "linear_probe=true", "augment.hue=0.2"]
    config = load_config(FinetuneConfig, minimal, given)
    shown = changed_settings(config)
    assert shown == [
        "out=runs/x",
        "data.train=train.csv",
        "model.head_norm=series",  # of the preset
        "optim.lr=0.5",
        "optim.milestones=[3, 5]",
        "init=my run",
        "linear_probe=true",
    ]
    assert load_config(FinetuneConfig, minimal, shown) == config
