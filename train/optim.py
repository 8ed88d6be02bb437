"""Optimisers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from train.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimiser that ``config`` names."""
    parameters = list(parameters)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def learning_rate(config: OptimConfig, *, step: int, epoch_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: The schedule.
        step: Steps taken before this one.
        epoch_steps: Steps in an epoch.
    """
    warmup_steps = round(config.warmup_epochs * epoch_steps)
    total_steps = config.epochs * epoch_steps
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "cosine":
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    drops = sum(step >= milestone * epoch_steps for milestone in config.milestones)
    return config.lr * config.gamma**drops


def take_step(optimizer: torch.optim.Optimizer, losses: Iterable[torch.Tensor], *, lr: float) -> None:
    """Back-propagate each loss as it comes, and update the weights by the sum at the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
