"""What every training run does around its steps: seeds, folder, videos, state, provenance and checkpoint."""

from __future__ import annotations

import contextlib
import math
import os
import random
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ivdr_deploy._console import print_text, say_left_out
from ivdr_deploy._files import atomic_path, naming_full_disk, remove_left_over, try_lock
from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.environment import git_revision, instruction_sets, package_versions
from ivdr_deploy.errors import ConfigError, DataError, FolderError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.torch_runtime import require_device
from ivdr_deploy.spec import CheckpointInfo, Provenance, TrainingState
from ivdr_deploy.video.reader import VideoLimits
from train.bf16 import keep_wrong_in_float32
from train.cache import CachedVideos, Keeping, cache_videos, say_skipped
from train.config import RunConfig
from train.config_file import changed_settings, settings_toml
from train.data import steps_per_epoch
from train.distributed import first_alone, rank, synchronise_norms, world_size
from train.log import METRICS_NAME
from train.optim import build_optimizer
from train.state import TrainState, keep_state, load_newest, run_digest, saved_states

CHECKPOINT_NAME = "checkpoint.safetensors"
SETTINGS_NAME = "settings.toml"


def start_run(config: RunConfig) -> None:
    """Show the settings, and seed every source of randomness.

    Raises:
        ConfigError: if the processes that train together cannot share a batch.
        DeviceError: if the device is not there.
    """
    require_device(config.device)
    share = config.optim.accumulate * world_size()
    if config.optim.batch_size % share or config.optim.batch_size < 2 * share:
        raise ConfigError(
            f"optim.batch_size {config.optim.batch_size} does not make two videos or more for each of "
            f"{world_size()} processes in {config.optim.accumulate} parts",
            hint="change optim.batch_size, optim.accumulate or the number of processes",
        )
    print_text(shlex.join(changed_settings(config)), style="dim")
    print_text(f"all settings: {Path(config.out) / SETTINGS_NAME}", style="dim")
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)


def runs_bf16(config: RunConfig) -> bool:
    """Say whether the backbone runs in bfloat16: where it was asked for, on a CPU only if that multiplies it.

    A CPU that does not is slower in it than in float32. A system that does not tell its instructions (see
    ``instruction_sets``) is taken at the word of the settings.
    """
    known = instruction_sets()
    if config.bf16 and config.device == "cpu" and known and "bf16" not in known:
        print_text(
            "bf16=true is for a GPU, or a processor that multiplies bfloat16; this run computes in float32",
            style="yellow",
        )
        return False
    return config.bf16


@contextmanager
def run_folder(config: RunConfig) -> Iterator[None]:
    """Claim the run folder while the block runs. Another run's work in it is neither written over nor mixed with ours.

    A folder that was made for this and is still empty at the end, as when a list cannot be read, is removed again.

    Raises:
        FolderError: if another process trains into it, or it holds files of a run without the state to go on from.
        OSError: if the folder cannot be made; a full disk is named by this folder in the whole block.
    """
    folder = Path(config.out)
    if rank() > 0:  # the first process has claimed it
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if not try_lock(descriptor):
                raise FolderError(
                    f"another process is training into {folder}", hint="wait for it, or give another out="
                )
            if not saved_states(folder):
                for name in (CHECKPOINT_NAME, METRICS_NAME):
                    if (folder / name).exists():
                        raise FolderError(
                            f"{folder} is used: it holds {name}, and no training state to go on from",
                            hint="give another out=, or move what is there",
                        )
            remove_left_over(folder)
            yield
        finally:
            with contextlib.suppress(OSError):  # it is used
                for path in made:
                    path.rmdir()
            os.close(descriptor)


def begin_or_resume(config: RunConfig, state: TrainState) -> None:
    """Keep settings and state before the first step, or take over the one that a run with the same settings left.

    Raises:
        FolderError: if the state in the run folder belongs to another run, or its run has ended.
        CheckpointError: if it is damaged.
    """
    folder = Path(config.out)
    with first_alone() as first:
        if first and not saved_states(folder):
            keep_settings(config)
            keep_state(state, folder, keep=config.keep_states)
            return
        path = load_newest(state, folder)
    total = state.epoch_steps * config.optim.epochs
    if state.step >= total and (folder / CHECKPOINT_NAME).exists():
        raise FolderError(
            f"the run in {folder} has ended: {total} steps are taken and {CHECKPOINT_NAME} is written",
            hint="give another out= to train again",
        )
    if state.step:
        print_text(f"going on after step {state.step} of {total}, from {path}")


def keep_settings(config: RunConfig) -> None:
    """Write all settings into the run folder, as a file that ``--config`` reads."""
    with atomic_path(Path(config.out) / SETTINGS_NAME) as temporary:
        temporary.write_text(settings_toml(config), encoding="utf-8")


def open_videos(config: RunConfig, videos: VideoList) -> CachedVideos:
    """Decode the training videos into the cache, and say which were skipped.

    Raises:
        DataError: if too many are unusable, or there are too few for the processes that train together.
    """
    say_left_out(videos.left_out)
    with first_alone() as first:
        cached = cache_videos(
            videos,
            config.clip,
            config.cache_dir,
            keeping=Keeping(
                form=config.data.cache_form, max_bytes=config.data.cache_gib * (1 << 30), fill=first
            ),
            decode=decode_options(config),
            limits=VideoLimits.allowing(config.data.allow_containers),
            max_bad_share=config.data.max_bad_share,
        )
    share = 2 * config.optim.accumulate * world_size()
    if len(cached) < share and share > 2:
        raise DataError(
            f"{videos.source}: {len(cached)} videos for {world_size()} processes in {config.optim.accumulate} parts",
            hint=f"training so needs at least {share}",
        )
    say_skipped(cached.skipped)
    straight = (
        f", {cached.straight} of them decoded in every step (data.cache_gib)" if cached.straight else ""
    )
    print_text(f"{len(cached)} training videos, {len(cached.skipped)} skipped{straight}")
    return cached


def decode_options(config: RunConfig) -> DecodeOptions:
    """Return how a run decodes videos."""
    return DecodeOptions(workers=config.data.decode_workers)


def prepare(config: RunConfig, step: nn.Module, device: torch.device) -> nn.Module:
    """Bring a step to its device, in training mode, as the settings and the processes that train together want it."""
    step.to(device).train()
    synchronise_norms(step, device)
    wrong: set[str] = set()
    for part in step.modules():
        if isinstance(part, VideoModel):
            if config.channels_last:
                part.backbone.to(memory_format=torch.channels_last_3d)
            if device.type == "cpu" and getattr(step, "bf16", False):
                wrong |= set(keep_wrong_in_float32(part, config.clip))
            if config.compile:
                part.backbone.compile()
    if wrong:
        print_text(
            "these compute in float32, since this processor gets their gradients wrong in bfloat16: "
            + ", ".join(sorted(wrong)),
            style="yellow",
        )
    return step


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
    name: str = CHECKPOINT_NAME,
) -> Path:
    """Write a checkpoint into the run folder and return its path; one process of several does."""
    path = Path(config.out) / name
    if rank() > 0:
        return path
    provenance = Provenance(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision=git_revision(),
        data_hash=videos.data_hash,
        seed=config.seed,
        packages=package_versions(),
        config=to_dict(config),
        # What the last line could not measure is NaN, such as the rank of shuffled clips where none was shuffled.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
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
    save_checkpoint(path, model=model, info=info, golden=golden)
    return path
