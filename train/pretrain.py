"""Self-supervised pre-training of the dual representation, SimCLR form."""

from __future__ import annotations

from pathlib import Path

import torch

from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import TrainingState
from ivdr_deploy.video.sampling import random_centre_clip
from train.config import PretrainConfig
from train.data import dual_views, steps_per_epoch
from train.dual import dual_loss, encode_views
from train.optim import build_optimizer, learning_rate, take_step
from train.run import RunLog, open_videos, start_run, training_steps, write_checkpoint


def pretrain(config: PretrainConfig) -> Path:
    """Train backbone, clip head and series head without labels.

    Returns:
        Path of the checkpoint.

    Raises:
        DataError: if the list is unusable, or too many of its videos are.
        ConfigError: if the settings do not fit the machine, or training diverges.
    """
    device = start_run(config)
    videos = read_video_list(config.data.train)
    cached = open_videos(config, videos)
    model = build_model(config.model, config.clip).to(device).train()
    if config.channels_last:
        model.backbone.to(memory_format=torch.channels_last_3d)
    optimizer = build_optimizer(model.parameters(), config.optim)
    epoch_steps = steps_per_epoch(len(cached), batch_size=config.optim.batch_size)
    total_steps = epoch_steps * config.optim.epochs

    steps = training_steps(config.optim, count=len(cached), seed=config.seed, description="pre-training")
    with RunLog(Path(config.out), total_steps=total_steps, every=config.log_every) as log:
        for step, rows, rng in steps:
            views = dual_views(
                cached,
                rows,
                config.clip,
                draw=random_centre_clip,
                rng=rng,
                reverse_probability=config.augment.reverse_probability,
            )
            loss, metrics = dual_loss(encode_views(model, views, config, rng=rng), config.dual)
            lr = learning_rate(config.optim, step=step, epoch_steps=epoch_steps)
            take_step(optimizer, loss, lr=lr)
            log.add(step, {"loss": loss, **metrics, "lr": lr})

    training = TrainingState(
        backbone_step=total_steps, head_steps=dict.fromkeys(config.dual.trained_heads, total_steps)
    )
    return write_checkpoint(
        config, model=model, videos=videos, cached=cached, labels=(), training=training, metrics=log.last
    )
