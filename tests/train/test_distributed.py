"""Processes that share a batch compute what one process computes with all of it."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import batch, network
from processes import finish, start
from runs import finetune_config, pretrain_config
from test_state import finetuning  # the pieces of a run
from torch import nn

from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ConfigError
from train.cache import cache_videos
from train.config import DataConfig, OptimConfig
from train.data import Batch
from train.distributed import GlobalBatchNorm, joined, mean_of_all, shared
from train.finetune import finetune
from train.loop import _mean_of_parts, _train, training_steps
from train.method import DualConfig
from train.pretrain import pretrain
from train.run import prepare
from train.state import TrainState
from train.step import DualStep, LabelStep, MocoStep

PARTS = 8


def shared_step(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A step with batch norms everywhere, and what it is to work on."""
    torch.manual_seed(0)
    if kind == "label":
        return LabelStep(network(2, classes=2)), torch.tensor([0, 1] * (PARTS // 2))
    if kind == "clip":  # a head that no loss reaches
        return DualStep(network(2, head_norm="both"), DualConfig(mode="clip")), torch.arange(PARTS)
    config = DualConfig(form=kind, queue_length=12, rank_theta=0.5)  # type: ignore[arg-type]
    step = (MocoStep if kind == "moco" else DualStep)(network(2, head_norm="both"), config)
    return step, torch.arange(PARTS)


def computed(kind: str) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers after two steps of one batch, in this process's share of it."""
    views, changes, permutation = batch(PARTS, 2)
    with joined("cpu") as device:
        step, truth = shared_step(kind)
        config = pretrain_config(Path("unused"), DataConfig(train="unused"), optim=OptimConfig(lr=0.0))
        prepare(config, step, device)
        forward = shared(step)

        def draw(share: Batch) -> dict[str, object]:
            own = torch.from_numpy(share.places)
            if kind == "label":
                taken = changes.take(share.places)
                return {"views": views[0, own], "changes": taken, "truth": truth[own]}
            places = (torch.arange(3)[:, None] * PARTS + own).ravel().numpy()
            drawn = {"views": views[:, own], "changes": changes.take(places), "permutation": permutation[own]}
            return drawn | ({"videos": truth[own]} if kind == "moco" else {})

        trained = [value for value in step.parameters() if value.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        state = TrainState(module=step, optimizer=optimizer, seed=0, digest="", epoch_steps=1)
        for number in range(2):
            whole = Batch(rows=np.arange(PARTS), places=np.arange(PARTS), seed=0, step=number)
            metrics = _train(config, forward, state, draw, whole)  # type: ignore[arg-type]
        found = {
            f"gradient {name}": value.grad
            for name, value in step.named_parameters()
            if value.grad is not None
        }
        found |= {f"buffer {name}": value.clone() for name, value in step.named_buffers()}
        loss = mean_of_all({"loss": float(metrics["loss"])})["loss"]
        return found | {"loss": torch.tensor(loss)}


SHARE = """
import sys, torch
torch.set_num_threads(1)
from test_distributed import computed, joined, mean_of_all
from train import distributed
with joined("cpu"):
    found = {kind: computed(kind) for kind in ("simclr", "moco", "label", "clip")}
    rank = torch.distributed.get_rank()
    odd = float("nan") if rank else 0.5  # known to the first alone
    own = distributed.shard(5)  # the first has one more than the last
    found["rows"] = distributed.gather_rows(torch.tensor([[float(place)] for place in own]), count=5)
    found["items"] = torch.tensor(distributed.gather_items(list(own), count=5))
    try:
        distributed.gather_items([*own, 9], count=5)
    except AssertionError:
        found["noticed"] = torch.ones(())
    found["means"] = mean_of_all({"swapped": odd, "loss": odd, "rank": float(rank)})
torch.save(found, sys.argv[1] + "/" + __import__("os").environ["RANK"])
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_losses_and_gradients_are_those_of_one_process(tmp_path: Path, processes: int) -> None:
    for code, error in finish(start(SHARE, str(tmp_path), processes=processes)):
        assert code == 0, error
    shares = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(processes)]
    for share in shares:
        assert share["means"]["swapped"] == 0.5
        assert share["rows"].flatten().tolist() == share["items"].tolist() == [0, 1, 2, 3, 4]  # each once
        assert "noticed" in share
        assert share["means"]["rank"] == (processes - 1) / 2
        assert math.isnan(share["means"]["loss"])
    for kind in ("simclr", "moco", "label", "clip"):
        expected = computed(kind)
        for share in shares:
            assert share[kind].keys() == expected.keys()
            for name, value in expected.items():
                far = float((share[kind][name].double() - value.double()).norm())
                assert far <= 1e-5 * max(1.0, float(value.double().norm())), f"{kind} {name}: {far}"


@pytest.mark.parametrize(
    ("theirs", "shape"),
    [
        (nn.BatchNorm3d(4), (3, 4, 2, 5, 5)),
        (nn.BatchNorm3d(4, affine=False), (3, 4, 2, 5, 5)),
        (nn.BatchNorm1d(4, momentum=None), (7, 4)),
    ],
    ids=["clips", "without weights", "vectors"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_over_one_process_is_torchs_own(
    theirs: nn.modules.batchnorm._BatchNorm, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    theirs = copy.deepcopy(theirs).to(dtype)
    for value in theirs.parameters():
        nn.init.uniform_(value)
    ours = GlobalBatchNorm(copy.deepcopy(theirs))
    for _ in range(2):
        x, wanted = (torch.randn(shape, dtype=dtype) for _ in range(2))
        for training in (True, False):
            gradients = []
            for norm in (ours, theirs):
                given = x.clone().requires_grad_()
                out = norm.train(training)(given)
                (out * wanted).sum().backward()
                gradients.append([out, given.grad, *(value.grad for value in norm.parameters())])
            torch.testing.assert_close(*gradients)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_a_norm_computes_in_float32_what_a_backbone_gives_in_bfloat16() -> None:
    norm = GlobalBatchNorm(nn.BatchNorm3d(4))
    x = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).mul(0.1).add(20).bfloat16()
    given = norm(x)
    assert given.dtype == torch.bfloat16
    expected = nn.BatchNorm3d(4)
    torch.testing.assert_close(given.float(), expected(x.float()), atol=0.01, rtol=0.01)
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)


def test_a_part_that_cannot_measure_something_leaves_it_to_the_others() -> None:
    some = [torch.tensor(math.nan), torch.tensor(0.5)]
    assert float(_mean_of_parts("swapped_accuracy", some)) == 0.5
    assert math.isnan(float(_mean_of_parts("loss_clip", some)))


def test_parts_of_a_batch_add_up(data: DataConfig, tmp_path: Path) -> None:
    """Of a label step in eval mode, whose loss is a mean over videos."""
    videos = read_video_list(data.train)
    cached = cache_videos(videos, finetune_config(tmp_path, data).clip, Path(data.cache))
    cached = replace(cached, items=cached.items[:8], videos=cached.videos[:8])
    states = []
    for accumulate in (1, 2):
        optim = OptimConfig(lr=0.1, epochs=1, batch_size=8, accumulate=accumulate)
        config, step, state, draw = finetuning(tmp_path / str(accumulate), cached, optim=optim)
        _train(config, step.eval(), state, draw, next(iter(training_steps(optim, count=8, seed=0))))
        states.append(step.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_a_batch_that_cannot_be_shared_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 8 does not make 3 equal parts"):
        OptimConfig(batch_size=8, accumulate=3)
    with pytest.raises(ConfigError, match="two videos or more"):
        OptimConfig(batch_size=4, accumulate=4)


TRAIN = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from runs import finetune_config, pretrain_config
from train.config import DataConfig
from train.finetune import finetune
from train.distributed import joined
from train.pretrain import pretrain
from ivdr_deploy._console import exiting
data = DataConfig(train=sys.argv[2], test=sys.argv[3], cache=sys.argv[4])
with exiting("train"), joined("cpu"):  # once for both: a second group would find the addresses of the first
    path = pretrain(pretrain_config(Path(sys.argv[1]) / "pre", data))
    torch.distributed.barrier()  # the first process writes what the others read
    finetune(finetune_config(Path(sys.argv[1]) / "ft", data, init=str(path), model=pretrain_config(Path(), data).model))
"""


@pytest.mark.exhaustive
def test_two_processes_pretrain_finetune_and_measure_every_test_video_once(
    data: DataConfig, tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "two"), data.train, data.test, data.cache]
    for code, error in finish(start(TRAIN, *arguments, processes=2)):
        assert code == 0, error
    alone = pretrain(pretrain_config(tmp_path / "pre", data))
    tuned = finetune(finetune_config(tmp_path / "ft", data, init=str(alone)))
    for name, path in (("pre", alone), ("ft", tuned)):
        one = read_checkpoint_info(path).provenance.metrics
        two = read_checkpoint_info(tmp_path / "two" / name / path.name).provenance.metrics
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)
    assert two["test_videos"] == one["test_videos"] == 6


def test_a_process_without_a_share_of_videos_is_told(data: DataConfig, tmp_path: Path) -> None:
    config = pretrain_config(tmp_path, data)
    crowded = replace(config, optim=replace(config.optim, batch_size=40, accumulate=20))
    with pytest.raises(Exception, match="16 videos for 1 processes in 20 parts"):
        pretrain(crowded)
