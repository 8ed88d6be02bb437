"""Self-supervised pre-training of the dual representation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.spec import TrainingState
from ivdr_deploy.video.sampling import random_centre_clip
from train.augment import Changes
from train.cache import CachedVideos
from train.config import PretrainConfig
from train.data import Batch, draw_dual_batch, golden_clips
from train.distributed import joined
from train.health import FeatureCheck
from train.loop import run_steps
from train.run import (
    begin_or_resume,
    open_state,
    open_videos,
    prepare,
    run_folder,
    runs_bf16,
    start_run,
    write_checkpoint,
)
from train.run_page import cached_facts, page_of_failure, write_run_page
from train.step import DualStep, MocoStep


def pretrain(config: PretrainConfig) -> Path:
    """Train backbone, clip head and series head without labels; go on from the state in ``config.out`` if there is one.

    Returns:
        Path of the checkpoint.

    Raises:
        DataError: if the list is unusable, or too many of its videos are.
        ConfigError: if the settings do not fit together.
        DeviceError: if the device is not there.
        TrainingError: if training diverges.
        FolderError: if ``config.out`` holds another run, or one that has ended.
    """
    with joined(config.device) as device:
        start_run(config)
        with run_folder(config):
            return _pretrain(config, device)


def _build_step(model: VideoModel, config: PretrainConfig) -> nn.Module:
    bf16 = runs_bf16(config)
    if config.dual.form == "moco":
        return MocoStep(model, config.dual, parts=config.optim.accumulate, bf16=bf16)
    return DualStep(model, config.dual, bf16=bf16)


def _pretrain(config: PretrainConfig, device: torch.device) -> Path:
    videos = read_video_list(config.data.train, root=config.data.root or None, part="train")
    model = build_model(config.model, config.clip)  # before the long work: it refuses what does not fit
    with open_videos(config, videos) as cached:
        return _pretrain_on(config, device, model, videos, cached)


def _pretrain_on(
    config: PretrainConfig, device: torch.device, model: VideoModel, videos: VideoList, cached: CachedVideos
) -> Path:
    step = prepare(config, _build_step(model, config), device)
    state = open_state(config, step, cached)
    begin_or_resume(config, state)

    def draw(batch: Batch) -> Mapping[str, Tensor | Changes]:
        return draw_dual_batch(cached, batch, config, draw=random_centre_clip)

    check = FeatureCheck(model, cached, config.clip)
    facts = cached_facts(cached)
    with page_of_failure(config, videos, facts):
        metrics = run_steps(
            config,
            step,
            state,
            draw,
            count=len(cached),
            description="pre-training",
            validate=check if check else None,
        )
    training = TrainingState(
        backbone_step=state.step, head_steps=dict.fromkeys(config.dual.trained_heads, state.step)
    )
    path = write_checkpoint(
        config,
        model=model,
        videos=videos,
        golden=golden_clips(cached, config.clip),
        labels=(),
        training=training,
        metrics=metrics,
    )
    write_run_page(config, videos, state=f"ended after {state.step} steps", facts=facts)
    return path
