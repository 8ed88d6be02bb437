"""Training settings: frozen dataclasses; ``train.config_file`` reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ivdr_deploy._files import at_home
from ivdr_deploy._text import as_text, quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import ClipSpec, Device, ModelSpec, ViewPlan
from ivdr_deploy.video.reader import VideoLimits
from train.frames import Form
from train.method import DualConfig
from train.method import in_range as _in_range


def _paths_at_home(config: object, *names: str) -> None:
    for name in names:
        object.__setattr__(config, name, at_home(getattr(config, name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the videos are."""

    train: str
    """List of training videos: a folder, csv, Parquet or text list, see ``ivdr_deploy.datasets.lists``. Of lists that
    hold both parts, as those of HMDB51 do, the training part."""

    root: str = ""
    """Where relative paths in the lists start; empty: at the folder of each list."""

    test: str = ""
    """Labelled list on which a fine-tuned model is measured at the end; empty: none. Of lists that hold both parts, the
    test part."""

    validation: str = ""
    """Labelled list on which fine-tuning is measured as it goes on, see ``validate_every``; empty: none."""

    cache: str = ""
    """Folder for decoded frames, which several runs may share; empty: ``cache`` in the run folder."""

    cache_form: Form = "jpeg"
    """Frames in the cache: ``jpeg``, an eighth of the size and about one level of grey away on average, or ``raw``, as
    they were decoded."""

    cache_gib: float = 64.0
    """Size of the frames in the cache, at most, in GiB. What was not used for longest makes room; videos of this run
    that do not fit are decoded again in every step. 0: all of them."""

    allow_containers: tuple[str, ...] = ()
    """Containers to open besides the usual ones, as in ``ivdr score --allow-container``: for example ``["asf"]``."""

    decode_workers: int = 2
    """Processes that decode videos, for the cache and for the test list."""

    max_bad_share: float = 0.05
    """Share of training videos that may be unusable or absent before training refuses to start, 0 to 1."""

    def __post_init__(self) -> None:
        _paths_at_home(self, "train", "root", "test", "validation", "cache")
        VideoLimits.allowing(self.allow_containers)  # refuses unknown names
        _in_range("cache_gib", self.cache_gib, 0.0)
        _in_range("decode_workers", self.decode_workers, 1)
        _in_range("max_bad_share", self.max_bad_share, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How the weights are updated."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser; ``sgd`` has momentum."""

    lr: float = 0.003
    """Learning rate after the warm-up."""

    momentum: float = 0.9
    """Momentum of ``sgd``."""

    weight_decay: float = 1e-4
    """Weight decay, on all parameters."""

    epochs: int = 200
    """Passes over the training list."""

    batch_size: int = 64
    """Videos in a step, of all processes together. A shorter list is one step an epoch; a remainder waits for another
    epoch."""

    accumulate: int = 1
    """Parts in which a batch goes through the network, one after the other, to need less memory. Contrast and batch
    norm see the videos of a part only."""

    schedule: Literal["step", "cosine"] = "step"
    """``step``: times ``gamma`` at each of ``milestones``. ``cosine``: down to 0 at the end."""

    milestones: tuple[int, ...] = (120, 160)
    """Epochs after which the rate drops, for ``step``."""

    gamma: float = 0.1
    """Factor of a drop, for ``step``; at most 1."""

    warmup_epochs: float = 0.0
    """Epochs over which the rate grows linearly from 0."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            _in_range(name, getattr(self, name), 0.0)
        for name in ("momentum", "gamma"):
            _in_range(name, getattr(self, name), 0.0, 1.0)
        for milestone in self.milestones:
            _in_range("milestones", milestone, 0)
        _in_range("epochs", self.epochs, 1)
        _in_range("batch_size", self.batch_size, 2)  # batch norm and contrast both need company
        _in_range("accumulate", self.accumulate, 1)
        if self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate:
            raise ConfigError(
                f"optim.batch_size {self.batch_size} does not make {self.accumulate} equal parts of two videos or more",
                hint="change optim.batch_size or optim.accumulate",
            )
        _in_range("warmup_epochs", self.warmup_epochs, 0.0, self.epochs)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes to a clip, the same for all its frames. Every clip gets a random crop."""

    plain_probability: float = 0.0
    """Probability that the first clip of a pre-training video is only cropped."""

    jitter_probability: float = 0.8
    """Probability of colour jitter."""

    brightness: float = 0.8
    """Brightness is multiplied by a factor from 1 - this to 1 + this (not below 0)."""

    contrast: float = 0.8
    """The same for the distance from mean grey."""

    saturation: float = 0.8
    """The same for the distance of a pixel from its grey."""

    hue: float = 0.2
    """Largest turn of the hue, in full turns, either way; at most 0.5."""

    blur_probability: float = 0.0
    """Probability of a Gaussian blur."""

    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""

    flip_probability: float = 0.0
    """Probability of a left-right mirror image. Leave at 0 when classes differ in left and right."""

    reverse_probability: float = 0.0
    """Probability of playing all clips of a video backwards. For pre-training: it would spoil labels."""

    def __post_init__(self) -> None:
        for name in ("plain", "jitter", "blur", "flip", "reverse"):
            _in_range(f"{name}_probability", getattr(self, f"{name}_probability"), 0.0, 1.0)
        for name in ("brightness", "contrast", "saturation"):
            _in_range(name, getattr(self, name), 0.0)
        _in_range("hue", self.hue, 0.0, 0.5)
        low, high = self.blur_sigma
        if not 0.0 < low <= high < math.inf:
            raise ConfigError(f"blur_sigma must be two growing positive numbers, found {self.blur_sigma}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What every training run has."""

    out: str
    """Run folder: settings, checkpoint, training state, ``metrics.csv`` and the TensorBoard events go there."""

    data: DataConfig
    clip: ClipSpec = field(default_factory=ClipSpec)
    """The contract."""

    view_plan: ViewPlan = field(default_factory=ViewPlan)
    """Clips of a video that evaluation and scoring look at unless told otherwise; training draws its own."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The network; the number of classes follows from the data."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    dual: DualConfig = field(default_factory=DualConfig)
    seed: int = 0
    """Seed of everything random."""

    log_every: int = 10
    """Steps that one line of the log averages."""

    on_alarm: Literal["warn", "stop"] = "warn"
    """What an alarm does (collapse, order plateau, divergence; see ``train.health``): it always stands in the log and
    in ``alarms.json``, and may end the run. A loss that is not finite ends every run."""

    keep_states: int = 2
    """Training states that are kept; the newest that is whole is gone on from."""

    compile: bool = False
    """Compile the backbone with ``torch.compile``: slower to start, quicker in long runs on a GPU."""

    device: Device = "cpu"
    bf16: bool = False
    """Run the backbone in bfloat16 autocast; heads and losses stay in float32. On a CPU that does not multiply
    bfloat16 the run says so and computes in float32."""

    channels_last: bool = True
    """Keep the convolution weights in the memory layout of the input, frames by pixels by channels."""

    def __post_init__(self) -> None:
        _paths_at_home(self, "out")
        if as_text(self.out) != self.out:
            raise ConfigError(
                f"out is {quoted(self.out)}, which is no text in UTF-8: TensorBoard cannot write there"
            )
        _in_range("seed", self.seed, 0, 2**32 - 1)  # as far as NumPy's own goes
        _in_range("log_every", self.log_every, 1)
        _in_range("keep_states", self.keep_states, 1)
        if self.model.num_classes:
            raise ConfigError("model.num_classes is not a setting", hint="it follows from the training list")
        if self.model.num_slots and self.clip.num_frames % self.model.num_slots:
            raise ConfigError(
                f"model.num_slots {self.model.num_slots} does not divide "
                f"clip.num_frames {self.clip.num_frames}"
            )

    @property
    def cache_dir(self) -> Path:
        """Folder of the decoded frames."""
        return Path(self.data.cache) if self.data.cache else Path(self.out) / "cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(RunConfig):
    """``python -m train pretrain``."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for name in ("test", "validation"):
            if given := getattr(self.data, name):
                raise ConfigError(
                    f"pre-training has no part for data.{name}, found {quoted(given)}",
                    hint="leave it out; `python -m train evaluate` measures on other videos",
                )
        _require_dual_heads(self)
        if self.dual.form == "moco" and self.dual.queue_length < self.optim.batch_size:
            raise ConfigError(
                f"dual.queue_length {self.dual.queue_length} does not hold the keys of one step, "
                f"optim.batch_size {self.optim.batch_size}",
                hint="raise dual.queue_length",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(RunConfig):
    """``python -m train finetune``."""

    init: str = ""
    """Checkpoint or bundle to start from: backbone and those dual heads that it has, and the classifier when it has the
    same labels. Empty: random weights."""

    dual_weight: float = 0.0
    """Weight of the dual-representation losses beside cross-entropy. Above 0 all heads stay valid."""

    linear_probe: bool = False
    """Train the classifier alone, on features of a backbone that stays as it is: those of the clips that ``view_plan``
    takes, computed once and kept in ``data.cache``. ``optim``, ``augment`` and ``bf16`` have no part in it."""

    against: str = ""
    """Settings file of another way to train on the same list. Both ways are tried on held-out groups of the training
    list, and the better one trains on all of it. Of the file, ``data``, ``out``, ``seed`` and ``device`` do not count.
    Empty: no such choice."""

    validate_every: float = 1.0
    """Epochs between two measurements on ``data.validation``, where there is one. The best weights are kept in
    ``best.safetensors`` beside the last ones."""

    patience: int = 0
    """Measurements without a better one after which training stops early; 0: it never does."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        _paths_at_home(self, "init", "against")
        _in_range("validate_every", self.validate_every, 1e-3, 1e6)
        _in_range("patience", self.patience, 0)
        if self.patience and not self.data.validation:
            raise ConfigError(
                f"patience {quoted(self.patience)} counts measurements on data.validation, and there is no such list",
                hint="give data.validation=LIST, or patience=0",
            )
        if self.data.validation and self.linear_probe:
            raise ConfigError("a linear probe is fitted in one go: data.validation has no part in it")
        _in_range("dual_weight", self.dual_weight, 0.0)
        if self.augment.reverse_probability:
            raise ConfigError("augment.reverse_probability must be 0 when labels are trained")
        if self.linear_probe and not self.init:
            raise ConfigError("linear_probe needs a trained backbone", hint="give init=CHECKPOINT")
        if self.linear_probe and self.dual_weight:
            raise ConfigError("linear_probe freezes what dual_weight trains; choose one")
        if self.dual_weight:
            _require_dual_heads(self)
            if self.dual.form != "simclr":
                raise ConfigError(
                    "dual_weight trains in the form simclr only, found dual.form=moco",
                    hint="a network that was pre-trained with moco is fine-tuned jointly with dual.form=simclr",
                )


def _require_dual_heads(config: RunConfig) -> None:
    for name in ("clip_dim", "num_slots"):
        if not getattr(config.model, name):
            raise ConfigError(f"model.{name} is 0, and the dual losses train the head that it describes")
    if config.dual.ranks and config.model.num_slots < 2:
        raise ConfigError(
            "model.num_slots must be at least 2 for the shuffle-rank loss, found 1",
            hint="set dual.mode=clip-tc or clip to do without it",
        )
