"""The loop over the steps of a run: batches, gradients, log, alarms, validation and saved states."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import tee
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ivdr_deploy._console import progress, stopping_softly
from train.augment import Changes
from train.config import OptimConfig, RunConfig
from train.data import Batch, epoch_batches, steps_per_epoch
from train.distributed import rank, shared, world_size
from train.dual import LossAndMetrics
from train.health import Watch
from train.log import RunLog
from train.optim import learning_rate, take_step
from train.state import TrainState, keep_state

SAVE_SECONDS = 300.0
"""The training state is saved with the first line of the log after this time: about what a run that dies loses."""

DrawBatch = Callable[[Batch], Mapping[str, Tensor | Changes]]
"""The videos of a step -> the arguments of the step's ``forward``, on the CPU."""

Validate = Callable[[], dict[str, float]]
"""Measures the network as it is; leaves its mode and every generator alone."""


AfterLine = Literal["go on", "save", "end"]
"""What a run does after a line of its log: nothing else, save its state, or save it and end."""


class Step(Protocol):
    """One of the modules of ``train.step``, or what wraps it."""

    def __call__(self, **batch: Any) -> LossAndMetrics:
        """Return loss and metrics of a batch."""


def run_steps(
    config: RunConfig,
    step: nn.Module,
    state: TrainState,
    draw: DrawBatch,
    *,
    count: int,
    description: str,
    validate: Validate | None = None,
    after_line: Callable[[], AfterLine] = lambda: "go on",
) -> dict[str, float]:
    """Train from the state's step to the end of the last epoch.

    The state is saved into the run folder now and then, and at the end. Ctrl-C or SIGTERM lets one process finish its
    step and save; a run that is ended otherwise, and one of several processes, loses what came after the last state.

    Args:
        config: The settings.
        step: Computes the loss; in training mode, on the device.
        state: Of the same network.
        draw: Makes the batch of a step.
        count: Training videos.
        description: For the progress bar.
        validate: Called before the first step and after every epoch; its metrics stand in the lines that follow.
        after_line: Called when a line of the log is written, and for the line at which a run goes on; says what to do
            then.

    Returns:
        The latest metrics.

    Raises:
        TrainingError: if the loss or a weight is not finite, or an alarm is to stop the run.
        OSError: if a state cannot be saved; the one before is kept.
    """
    folder = Path(config.out)
    total = state.epoch_steps * config.optim.epochs
    if state.step and (state.step % config.log_every == 0 or state.step == total) and after_line() == "end":
        return state.metrics  # it was asked to stop at a line of which something was still due
    if state.step == total:  # it ended between its last step and its checkpoint
        return state.metrics
    steps, shown = tee(training_steps(config.optim, count=count, seed=config.seed, start=state.step))
    drawn = ahead(draw, (share for batch in shown for share in _shares(config, batch)))
    watched = progress(steps, total=total - state.step, description=description)
    forward = cast(Step, shared(step))
    watch = Watch(
        state,
        folder,
        total_steps=total,
        stops=config.on_alarm == "stop",
        warmup=config.dual.rank_warmup_steps,
    )
    with (
        _stopping() as wished,
        closing(drawn),
        RunLog(folder, total_steps=total, every=config.log_every, position=state.log_bytes) as log,
    ):
        if validate is not None and not state.validation:
            state.validation = validate()
        saved = time.monotonic()
        for batch in watched:
            metrics = _train(config, forward, state, lambda _: next(drawn), batch)
            state.step = batch.step + 1
            if validate is not None and state.step % state.epoch_steps == 0:
                state.validation = validate()
            stop = wished()
            if not log.add(batch.step, metrics | state.validation, now=stop):
                continue
            state.log_bytes, state.metrics = log.position, log.last
            alarm = watch.look()
            then = "end" if stop else after_line()
            if alarm or then != "go on" or state.step == total or time.monotonic() - saved >= SAVE_SECONDS:
                keep_state(state, folder, keep=config.keep_states)
                saved = time.monotonic()
            if alarm:
                raise alarm
            if then == "end":
                break
    return state.metrics


def _stopping() -> AbstractContextManager[Callable[[], bool]]:
    """Let a wish to stop wait for the step in work. Several processes would have to agree on a step: they just end.

    So does a run in another thread than the first, which gets no signals.
    """
    if world_size() > 1 or threading.current_thread() is not threading.main_thread():
        return nullcontext(lambda: False)
    return stopping_softly(
        "stopping when this step is done; its state is kept, and the same command goes on from it"
    )


def _train(
    config: RunConfig, forward: Step, state: TrainState, draw: DrawBatch, batch: Batch
) -> dict[str, Tensor | float]:
    """Take one step, in the parts that the settings ask for; return the means of its metrics."""
    parts, device = config.optim.accumulate, state.device
    torch.manual_seed(batch.torch_seed(rank()))  # for dropout
    seen: list[dict[str, Tensor]] = []

    def losses() -> Iterator[Tensor]:
        for number, share in enumerate(_shares(config, batch)):
            waits = number + 1 < parts and isinstance(forward, DistributedDataParallel)
            # Its gradient is computed before this goes on, so still within.
            with cast(DistributedDataParallel, forward).no_sync() if waits else nullcontext():
                loss, metrics = forward(**on_device(draw(share), device))
                seen.append({"loss": loss.detach(), **metrics})
                yield loss / parts

    lr = learning_rate(config.optim, step=batch.step, epoch_steps=state.epoch_steps)
    take_step(state.optimizer, losses(), lr=lr)
    return {name: _mean_of_parts(name, [part[name] for part in seen]) for name in seen[0]} | {"lr": lr}


def _mean_of_parts(name: str, values: Sequence[Tensor]) -> Tensor:
    """Return the mean of a metric over the parts of a batch that could measure it; of a loss, over all."""
    stacked = torch.stack(list(values))
    return stacked.mean() if name.startswith("loss") else stacked.nanmean()


def _shares(config: RunConfig, batch: Batch) -> list[Batch]:
    """Return what this process draws of a batch, part by part."""
    parts = config.optim.accumulate
    return [batch.part(number, parts, rank=rank(), ranks=world_size()) for number in range(parts)]


def ahead(draw: DrawBatch, shares: Iterable[Batch]) -> Generator[Mapping[str, Tensor | Changes]]:
    """Draw the shares one after the other, each while the one before it is trained on."""
    with ThreadPoolExecutor(1, thread_name_prefix="draw") as thread:
        waiting: deque[Future[Mapping[str, Tensor | Changes]]] = deque()
        for share in shares:
            waiting.append(thread.submit(draw, share))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def on_device(batch: Mapping[str, Tensor | Changes], device: torch.device) -> dict[str, Tensor | Changes]:
    """Return a batch on a device."""

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
    multiple = config.accumulate * world_size()
    for epoch in range(start // epoch_steps, config.epochs):
        order = np.random.default_rng([seed, 0, epoch])
        batches = epoch_batches(count, batch_size=config.batch_size, rng=order, multiple=multiple)
        for place, rows in enumerate(batches):
            step = epoch * epoch_steps + place
            if step >= start:
                yield Batch(rows=rows, places=np.arange(len(rows)), seed=seed, step=step)
