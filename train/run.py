"""What every training run does around its loop: seeds, device, log, provenance, checkpoint."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy._console import console, progress
from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.environment import git_revision, package_versions
from ivdr_deploy.errors import ConfigError, MissingDependencyError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import CheckpointInfo, Provenance, TrainingState
from train.config import OptimConfig, RunConfig
from train.data import CachedVideos, cache_videos, epoch_batches, golden_clips, steps_per_epoch

CHECKPOINT_NAME = "checkpoint.safetensors"


def start_run(config: RunConfig) -> torch.device:
    """Show the settings, seed every source of randomness, and return the device.

    Raises:
        ConfigError: if the device is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no GPU", hint="set device=cpu")
    for line in _settings_lines(to_dict(config)):
        console.print(line, style="dim", markup=False)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    return torch.device(config.device)


def _settings_lines(settings: Mapping[str, Any]) -> Iterator[str]:
    """Spell the resolved settings, a line for each table, in the form in which they can be overridden."""
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    yield "  ".join(f"{name}={value}" for name, value in settings.items() if name not in tables)
    for table, values in tables.items():
        yield "  ".join(f"{table}.{name}={value}" for name, value in values.items())


def open_videos(config: RunConfig, videos: VideoList) -> CachedVideos:
    """Decode the training videos into the cache, and say which were skipped."""
    cached = cache_videos(
        videos,
        config.clip,
        config.cache_dir,
        decode_threads=config.data.decode_threads,
        max_bad_share=config.data.max_bad_share,
    )
    for item, error in cached.skipped:
        console.print(f"skipped {item.uri}: {error}", style="yellow", markup=False)
    console.print(f"{len(cached)} training videos, {len(cached.skipped)} skipped", markup=False)
    return cached


def training_steps(
    config: OptimConfig, *, count: int, seed: int, description: str
) -> Iterator[tuple[int, np.ndarray, np.random.Generator]]:
    """Yield step, rows of the batch, and a generator that depends on seed and step alone."""
    epoch_steps = steps_per_epoch(count, batch_size=config.batch_size)

    def steps() -> Iterator[tuple[int, np.ndarray, np.random.Generator]]:
        for epoch in range(config.epochs):
            order = np.random.default_rng([seed, 0, epoch])
            batches = epoch_batches(count, batch_size=config.batch_size, rng=order)
            for place, rows in enumerate(batches):
                step = epoch * epoch_steps + place
                yield step, rows, np.random.default_rng([seed, 1, step])

    return progress(steps(), total=config.epochs * epoch_steps, description=description)


class RunLog:
    """Means of the metrics over every few steps, to ``metrics.csv``, TensorBoard and the console.

    Args:
        folder: The run folder.
        total_steps: Steps of the run.
        every: Steps that one line covers.
    """

    def __init__(self, folder: Path, *, total_steps: int, every: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                f"training writes TensorBoard events, and tensorboard cannot be imported ({error})",
                hint="install it with: pip install tensorboard",
            ) from error

        folder.mkdir(parents=True, exist_ok=True)
        self._total = total_steps
        self._every = every
        self._window: list[dict[str, Tensor | float]] = []
        self._file = (folder / "metrics.csv").open("w", newline="", encoding="utf-8")
        self._csv: csv.DictWriter[str] | None = None
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self._board = SummaryWriter(str(folder / "tensorboard" / stamp))
        self.last: dict[str, float] = {}
        """Means of the latest line."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Take the metrics of one step; tensors are read only when a line is due: the device need not wait.

        Raises:
            ConfigError: if the loss is not finite.
        """
        self._window.append(
            {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        )
        if len(self._window) == self._every or step + 1 == self._total:
            self._write(step + 1)

    def _write(self, step: int) -> None:
        window, self._window = self._window, []
        self.last = {name: sum(float(row[name]) for row in window) / len(window) for name in window[0]}
        if self._csv is None:
            self._csv = csv.DictWriter(self._file, fieldnames=["step", *self.last])
            self._csv.writeheader()
        self._csv.writerow({"step": step, **{name: f"{value:.6g}" for name, value in self.last.items()}})
        self._file.flush()
        for name, value in self.last.items():
            self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.3g}" for name, value in self.last.items())
        console.print(f"step {step}/{self._total}  {shown}", markup=False)
        if not math.isfinite(self.last["loss"]):
            raise ConfigError(
                f"the loss is {self.last['loss']} at step {step}",
                hint="lower optim.lr, or set optim.warmup_epochs",
            )


def write_checkpoint(
    config: RunConfig,
    *,
    model: VideoModel,
    videos: VideoList,
    cached: CachedVideos,
    labels: tuple[str, ...],
    training: TrainingState,
    metrics: Mapping[str, float],
) -> Path:
    """Write the checkpoint of a finished run into its folder and return its path."""
    provenance = Provenance(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision=git_revision(),
        data_hash=videos.data_hash,
        seed=config.seed,
        packages=package_versions(),
        config=to_dict(config),
        metrics=dict(metrics),
    )
    info = CheckpointInfo(
        clip=config.clip, model=model.spec, labels=labels, training=training, provenance=provenance
    )
    path = Path(config.out) / CHECKPOINT_NAME
    save_checkpoint(path, model=model, info=info, golden=golden_clips(cached, config.clip))
    return path
