"""Self-supervised pre-training of the dual representation, SimCLR form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import TrainingState
from ivdr_deploy.video.sampling import random_centre_clip
from train.augment import Changes
from train.config import PretrainConfig
from train.data import draw_dual_batch, golden_clips
from train.run import (
    begin_or_resume,
    open_state,
    open_videos,
    run_folder,
    run_steps,
    runs_bf16,
    start_run,
    write_checkpoint,
)
from train.step import DualStep


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
    device = start_run(config)
    with run_folder(config):
        videos = read_video_list(config.data.train, root=config.data.root or None, part="train")
        model = build_model(config.model, config.clip).to(
            device
        )  # before the long work: it refuses what does not fit
        cached = open_videos(config, videos)
        if config.channels_last:
            model.backbone.to(memory_format=torch.channels_last_3d)
        step = DualStep(model, config.dual, bf16=runs_bf16(config)).train()
        state = open_state(config, model, cached)
        begin_or_resume(config, state)

        def draw(rows: np.ndarray, rng: np.random.Generator) -> Mapping[str, Tensor | Changes]:
            return draw_dual_batch(cached, rows, config, draw=random_centre_clip, rng=rng)

        metrics = run_steps(config, step, state, draw, count=len(cached), description="pre-training")
        training = TrainingState(
            backbone_step=state.step, head_steps=dict.fromkeys(config.dual.trained_heads, state.step)
        )
        return write_checkpoint(
            config,
            model=model,
            videos=videos,
            golden=golden_clips(cached, config.clip),
            labels=(),
            training=training,
            metrics=metrics,
        )
