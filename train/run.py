"""What every training run does: seeds and device, the loop over the steps, provenance and checkpoint."""

from __future__ import annotations

import os
import random
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ivdr_deploy._console import console, progress, say_left_out
from ivdr_deploy._files import atomic_path, naming_full_disk, remove_left_over, try_lock
from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import git_revision, instruction_sets, package_versions
from ivdr_deploy.errors import FolderError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.torch_runtime import require_device
from ivdr_deploy.spec import CheckpointInfo, Provenance, TrainingState
from ivdr_deploy.video.reader import VideoLimits
from train.augment import Changes
from train.cache import CachedVideos, cache_videos
from train.config import OptimConfig, RunConfig
from train.config_file import changed_settings, settings_toml
from train.data import Batch, epoch_batches, steps_per_epoch
from train.dual import LossAndMetrics
from train.log import METRICS_NAME, RunLog
from train.optim import build_optimizer, learning_rate, take_step
from train.state import STATE_NAME, TrainState, run_digest

CHECKPOINT_NAME = "checkpoint.safetensors"
SETTINGS_NAME = "settings.toml"

SAVE_SECONDS = 300.0
"""The training state is saved with the first line of the log after this time: about what a run that dies loses."""

DrawBatch = Callable[[Batch], Mapping[str, Tensor | Changes]]
"""The videos of a step -> the arguments of the step's ``forward``, on the CPU."""


class Step(Protocol):
    """One of the modules of ``train.step``, or what wraps it."""

    def __call__(self, **batch: Any) -> LossAndMetrics:
        """Return loss and metrics of a batch."""


def start_run(config: RunConfig) -> torch.device:
    """Show the settings, seed every source of randomness, and return the device.

    Raises:
        DeviceError: if the device is not there.
    """
    require_device(config.device)
    console.print(shlex.join(changed_settings(config)), style="dim", markup=False)
    console.print(f"all settings: {Path(config.out) / SETTINGS_NAME}", style="dim", markup=False)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    return torch.device(config.device)


def runs_bf16(config: RunConfig) -> bool:
    """Say whether the backbone runs in bfloat16: where it was asked for, on a CPU only if that multiplies it.

    A CPU that does not is slower in it than in float32, and on one with AVX-512 alone torch 2.14 gave gradients that
    were not finite. A system that does not tell its instructions (see ``instruction_sets``) is taken at the word of
    the settings.
    """
    known = instruction_sets()
    if config.bf16 and config.device == "cpu" and known and "bf16" not in known:
        console.print(
            "bf16=true is for a GPU, or a processor that multiplies bfloat16; this run computes in float32",
            style="yellow",
            markup=False,
        )
        return False
    return config.bf16


@contextmanager
def run_folder(config: RunConfig) -> Iterator[None]:
    """Claim the run folder while the block runs. Another run's work in it is neither written over nor mixed with ours.

    Raises:
        FolderError: if another process trains into it, or it holds files of a run without the state to go on from.
        OSError: if the folder cannot be made; a full disk is named by this folder in the whole block.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if not try_lock(descriptor):
                raise FolderError(
                    f"another process is training into {folder}", hint="wait for it, or give another out="
                )
            if not (folder / STATE_NAME).exists():
                for name in (CHECKPOINT_NAME, METRICS_NAME):
                    if (folder / name).exists():
                        raise FolderError(
                            f"{folder} is used: it holds {name}, and no {STATE_NAME} to go on from",
                            hint="give another out=, or move what is there",
                        )
            remove_left_over(folder)
            yield
        finally:
            os.close(descriptor)


def begin_or_resume(config: RunConfig, state: TrainState) -> None:
    """Keep settings and state before the first step, or take over the one that a run with the same settings left.

    Raises:
        FolderError: if the state in the run folder belongs to another run, or its run has ended.
        CheckpointError: if it is damaged.
    """
    folder = Path(config.out)
    path = folder / STATE_NAME
    if not path.exists():
        keep_settings(config)
        state.save(path)
        return
    state.load(path)
    total = state.epoch_steps * config.optim.epochs
    if state.step >= total and (folder / CHECKPOINT_NAME).exists():
        raise FolderError(
            f"the run in {folder} has ended: {total} steps are taken and {CHECKPOINT_NAME} is written",
            hint="give another out= to train again",
        )
    console.print(f"going on after step {state.step} of {total}, from {path}", markup=False)


def keep_settings(config: RunConfig) -> None:
    """Write all settings into the run folder, as a file that ``--config`` reads."""
    with atomic_path(Path(config.out) / SETTINGS_NAME) as temporary:
        temporary.write_text(settings_toml(config), encoding="utf-8")


def open_videos(config: RunConfig, videos: VideoList) -> CachedVideos:
    """Decode the training videos into the cache, and say which were skipped."""
    say_left_out(videos.left_out)
    cached = cache_videos(
        videos,
        config.clip,
        config.cache_dir,
        decode=decode_options(config),
        limits=VideoLimits.allowing(config.data.allow_containers),
        max_bad_share=config.data.max_bad_share,
    )
    for item, error in cached.skipped:
        console.print(f"skipped {item.uri}: {error}", style="yellow", markup=False)
    console.print(f"{len(cached)} training videos, {len(cached.skipped)} skipped", markup=False)
    return cached


def decode_options(config: RunConfig) -> DecodeOptions:
    """Return how a run decodes videos."""
    return DecodeOptions(workers=config.data.decode_workers)


def open_state(config: RunConfig, module: nn.Module, cached: CachedVideos) -> TrainState:
    """Return the state of a run before its first step. Only weights that require a gradient are trained."""
    trained = [value for value in module.parameters() if value.requires_grad]
    return TrainState(
        module=module,
        optimizer=build_optimizer(trained, config.optim),
        seed=config.seed,
        digest=run_digest(config, cached),
        epoch_steps=steps_per_epoch(len(cached), batch_size=config.optim.batch_size),
    )


def run_steps(
    config: RunConfig, step: Step, state: TrainState, draw: DrawBatch, *, count: int, description: str
) -> dict[str, float]:
    """Train from the state's step to the end of the last epoch.

    The state is saved into the run folder now and then, and at the end. A run that is stopped by whatever loses what
    came after the last saved state.

    Args:
        config: The settings.
        step: Computes the loss; in training mode, on the device.
        state: Of the same network.
        draw: Makes the batch of a step.
        count: Training videos.
        description: For the progress bar.

    Returns:
        The latest metrics.

    Raises:
        TrainingError: if the loss or a weight is not finite.
    """
    folder, device = Path(config.out), torch.device(config.device)
    total = state.epoch_steps * config.optim.epochs
    steps = training_steps(config.optim, count=count, seed=config.seed, start=state.step)
    watched = progress(steps, total=total - state.step, description=description)
    if state.step == total:  # it ended between its last step and its checkpoint
        return state.metrics
    with RunLog(folder, total_steps=total, every=config.log_every, position=state.log_bytes) as log:
        saved = time.monotonic()
        for batch in watched:
            loss, metrics = step(**_on_device(draw(batch), device))
            lr = learning_rate(config.optim, step=batch.step, epoch_steps=state.epoch_steps)
            take_step(state.optimizer, loss, lr=lr)
            state.step = batch.step + 1
            written = log.add(batch.step, {"loss": loss, **metrics, "lr": lr})
            if written and (state.step == total or time.monotonic() - saved >= SAVE_SECONDS):
                state.log_bytes, state.metrics = log.position, log.last
                state.save(folder / STATE_NAME)
                saved = time.monotonic()
        return state.metrics


def _on_device(batch: Mapping[str, Tensor | Changes], device: torch.device) -> dict[str, Tensor | Changes]:
    def move(value: Tensor | Changes) -> Tensor | Changes:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)

    return {name: move(value) for name, value in batch.items()}


def training_steps(config: OptimConfig, *, count: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Yield the batch of each step, which depends on seed and step alone.

    Args:
        config: Epochs and batch size.
        count: Training videos.
        seed: Of the run.
        start: The first step; those before it were taken.
    """
    epoch_steps = steps_per_epoch(count, batch_size=config.batch_size)
    for epoch in range(start // epoch_steps, config.epochs):
        order = np.random.default_rng([seed, 0, epoch])
        for place, rows in enumerate(epoch_batches(count, batch_size=config.batch_size, rng=order)):
            step = epoch * epoch_steps + place
            if step >= start:
                yield Batch(rows=rows, places=np.arange(len(rows)), seed=seed, step=step)


def write_checkpoint(
    config: RunConfig,
    *,
    model: VideoModel,
    videos: VideoList,
    golden: np.ndarray,
    labels: tuple[str, ...],
    training: TrainingState,
    metrics: Mapping[str, float],
    origin: Mapping[str, str] | None = None,
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
        origin=dict(origin or {}),
    )
    info = CheckpointInfo(
        clip=config.clip,
        view_plan=config.view_plan,
        model=model.spec,
        labels=labels,
        training=training,
        provenance=provenance,
    )
    path = Path(config.out) / CHECKPOINT_NAME
    save_checkpoint(path, model=model, info=info, golden=golden)
    return path
