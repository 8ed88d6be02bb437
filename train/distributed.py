"""Several processes that train one network, as ``torchrun`` starts them: each a share of every batch.

Losses, batch norms and gradients are those of one process with the whole batch. What a forward pass gathers, a backward
pass sums: a row's gradient is the sum of what all processes say about it. DDP then takes the mean over processes,
which makes up for the mean over own rows.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ivdr_deploy._console import console
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import Device

T = TypeVar("T")

_PATIENCE = timedelta(days=1)
"""The others wait while the first process decodes the list; where one dies, ``torchrun`` ends them all."""


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(device: Device) -> torch.device:
    """Return the device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


@contextmanager
def joined(device: Device) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, for a block; yield the device of this one.

    Only the first process talks.

    Raises:
        ConfigError: if there are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield torch.device(device)
        return
    place = torch.device("cpu")
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} on this machine has no GPU: it has {torch.cuda.device_count()}",
                hint="give torchrun --nproc-per-node at most the number of GPUs",
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        console.quiet = console.quiet or rank() > 0
        # The layout of a gradient of some 1x1x1 convolutions has two spellings; DDP copies it then.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        yield place
    finally:
        dist.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[bool]:
    """Let the first process run a block before the others do; yields whether this is the first."""
    if rank() > 0:
        dist.barrier()
    yield rank() == 0
    if rank() == 0 and world_size() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    """Rows of all processes. The stock gather is not used: under gloo it has returned scrambled gradients."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        """Gather (B, ...) to (W * B, ...)."""
        every = own.new_empty((world_size() * len(own), *own.shape[1:]))
        dist.all_gather(list(every.chunk(world_size())), own.contiguous())
        return every

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Sum the gradient over processes and return the own rows of it."""
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        count = len(summed) // world_size()
        return summed[rank() * count :][:count]


class _Normalise(torch.autograd.Function):
    """The batch norm of a training step over the batches of all processes, in the passes that torch's own takes.

    What is taken over the batch goes around once each way: two numbers a channel.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised (N, C, ...), and mean and biased variance over all of it, (C,) each."""
        means, variances = gather(
            torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0))[None]
        ).unbind(1)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)  # of batches of one size
        context.save_for_backward(x, weight, mean, variance)
        context.eps = eps
        context.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x over all processes, and of weight and bias over the own batch."""
        x, weight, mean, variance = context.saved_tensors
        weight = torch.ones_like(mean) if weight is None else weight
        # As if mean and variance were constants, and then what they owe to every x.
        own, own_weight, own_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, variance, None, None, False, context.eps, [True, True, True]
        )
        total = torch.stack([own_weight, own_bias])
        if world_size() > 1:
            dist.all_reduce(total)
        share = weight * (variance + context.eps).rsqrt() * mean.numel() / (x.numel() * world_size())
        own -= F.batch_norm(x, mean, variance, share * total[0], share * total[1], False, 0.0, context.eps)
        given = (own, own_weight, own_bias, None)
        return tuple(
            one if asked else None for one, asked in zip(given, context.needs_input_grad, strict=True)
        )


def gather(own: Tensor) -> Tensor:
    """Return the rows (B, ...) of all processes, (W * B, ...) by rank, with the gradient of all; alone, ``own``."""
    if world_size() == 1:
        return own
    every: Tensor = _Gather.apply(own)
    return every


class GlobalBatchNorm(nn.Module):
    """A batch norm over the batches of all processes, also on a CPU, which torch's own does not run on.

    Args:
        norm: Its weights and statistics are taken over, under the same names. Every process has as many clips.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum
        for name, value in (("weight", norm.weight), ("bias", norm.bias)):
            if value is None or isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:  # a constant
                self.register_buffer(name, value, persistent=False)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...) over every axis but C; in float32 at least, as torch's own does."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        out, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (count / (count - 1)), share)
        normalised: Tensor = out.to(given)
        return normalised


def synchronise_norms(module: nn.Module, device: torch.device) -> None:
    """Let every batch norm inside a module see the whole batch; the names of its weights stay as they are."""
    if world_size() == 1:
        return
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if device.type == "cuda" and type(child) in (nn.BatchNorm1d, nn.BatchNorm3d):
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
            else:
                setattr(module, name, GlobalBatchNorm(child))
        else:
            synchronise_norms(child, device)


def shared(step: nn.Module) -> nn.Module:
    """Wrap a step so that processes take the mean of their gradients; alone, it stays as it is.

    Buffers are not sent around at every step: batch norms over the whole batch and the queue are the same everywhere.
    """
    if world_size() == 1:
        return step
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    wrap: Any = nn.parallel.DistributedDataParallel
    wrapped: nn.Module = wrap(step, **{name: False})
    return wrapped


def is_unknown(name: str, value: float) -> bool:
    """Whether a metric could not be measured: NaN, which of a loss is a divergence instead."""
    return math.isnan(value) and not name.startswith("loss")


def mean_of_all(values: Mapping[str, float]) -> dict[str, float]:
    """Return the means of metrics that all processes have, in the same order, over those to which they are known."""
    if world_size() == 1:
        return dict(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    pairs = [(0.0, 0.0) if is_unknown(name, value) else (value, 1.0) for name, value in values.items()]
    total = torch.tensor(pairs, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total[:, 0] / total[:, 1]).tolist(), strict=True))


def shard(count: int) -> range:
    """Return which of ``count`` things are this process's: every one belongs to exactly one process."""
    return range(rank(), count, world_size())


def gather_rows(own: Tensor, *, count: int) -> Tensor:
    """Put rows that each process computed for its ``shard`` together again, in the order of the whole.

    Args:
        own: (len(shard(count)), F), on the CPU.
        count: Rows in all.
    """
    if world_size() == 1:
        assert len(own) == count
        return own
    longest = -(-count // world_size())
    padded = own.new_zeros((longest, *own.shape[1:]))
    padded[: len(own)] = own
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    every = gather(padded.to(device)).cpu().view(world_size(), longest, *own.shape[1:])
    whole: Tensor = every.transpose(0, 1).flatten(0, 1)[:count]  # place i is of process i mod W
    told = sum_of_all({"rows": len(own)})["rows"]
    assert told == count, f"{told} rows of {count} were computed"
    return whole.contiguous()


def gather_items(own: Sequence[T], *, count: int) -> list[T]:
    """Put what each process made for its ``shard`` together again, in the order of the whole.

    Args:
        own: One item for each of ``shard(count)``; small, since it is pickled.
        count: Items in all.
    """
    every: list[list[T]] = [list(own)]
    if world_size() > 1:
        every = [[] for _ in range(world_size())]
        dist.all_gather_object(every, list(own))
    whole = [every[place % len(every)][place // len(every)] for place in range(count)]
    told = sum(len(part) for part in every)
    assert told == count, f"{told} items of {count} were made"
    return whole


def sum_of_all(values: Mapping[str, int]) -> dict[str, int]:
    """Return the sums over processes of whole numbers that all of them have, in the same order."""
    means = mean_of_all({name: float(value) for name, value in values.items()})
    return {name: round(value * world_size()) for name, value in means.items()}
