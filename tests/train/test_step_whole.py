"""DDP and the compiler take a training step whole."""

import copy
from collections.abc import Iterator

import pytest
import torch
from batches import batch, first_view, network
from torch import nn

from train.method import DualConfig
from train.step import DualStep, JointStep, LabelStep, MocoStep


def steps_and_arguments() -> list[tuple[nn.Module, tuple[object, ...]]]:
    views, changes, permutation = batch(4)
    truth = torch.tensor([0, 1, 1, 0])
    first = first_view(changes, 4)
    return [
        (DualStep(network(), DualConfig()), (views, changes, permutation)),
        (LabelStep(network(classes=2)), (views[0], first, truth)),
        (JointStep(network(classes=2), DualConfig(), dual_weight=0.1), (views, changes, permutation, truth)),
        (
            MocoStep(network(head_norm="both"), DualConfig(form="moco", queue_length=6)),
            (views, changes, permutation, truth),
        ),
    ]


@pytest.mark.parametrize("kind", range(4), ids=["dual", "label", "joint", "moco"])
def test_compiles_as_one_graph_with_the_same_loss(kind: int) -> None:
    """``fullgraph`` refuses whatever needs the host: a value that is read, numpy, a shape that depends on data."""
    step, arguments = steps_and_arguments()[kind]
    expected, metrics = copy.deepcopy(step)(*arguments)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    loss, given = compiled(*arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(given, metrics)
    loss.backward()


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # of speed alone
@pytest.mark.parametrize("kind", range(4), ids=["dual", "label", "joint", "moco"])
def test_runs_under_ddp_with_the_same_gradients(process_group: None, kind: int) -> None:
    step, arguments = steps_and_arguments()[kind]
    alone = copy.deepcopy(step)
    wrapped = nn.parallel.DistributedDataParallel(step)
    for _ in range(2):  # the second pass fails if a gradient of the first one never came
        for one in (wrapped, alone):
            one.zero_grad()
            one(*arguments)[0].backward()
    for (name, ours), theirs in zip(step.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
