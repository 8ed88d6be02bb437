"""The learning rate over a run, and one step."""

import math

import pytest
import torch

from train.config import OptimConfig
from train.optim import build_optimizer, learning_rate, take_step


def test_step_schedule_drops_after_its_milestones() -> None:
    config = OptimConfig(lr=1.0, epochs=10, schedule="step", milestones=(4, 8))
    rates = [learning_rate(config, step=step, epoch_steps=5) for step in (0, 19, 20, 39, 40, 49)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_drop_is_by_the_factor_that_is_set() -> None:
    config = OptimConfig(lr=1.0, epochs=3, schedule="step", milestones=(1, 2), gamma=0.5)
    rates = [learning_rate(config, step=step, epoch_steps=1) for step in range(3)]
    assert rates == pytest.approx([1, 0.5, 0.25])


def test_cosine_schedule_falls_from_the_full_rate_towards_zero() -> None:
    config = OptimConfig(lr=2.0, epochs=4, schedule="cosine")
    rates = [learning_rate(config, step=step, epoch_steps=5) for step in range(20)]
    assert rates[0] == 2.0
    assert rates[10] == pytest.approx(1.0)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1.0 + math.cos(math.pi * 19 / 20))


def test_warm_up_grows_linearly_to_the_full_rate() -> None:
    config = OptimConfig(lr=1.0, epochs=4, schedule="cosine", warmup_epochs=0.8)
    assert [learning_rate(config, step=step, epoch_steps=5) for step in range(5)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0]
    )


def test_after_the_warm_up_the_cosine_takes_all_the_steps_that_are_left() -> None:
    config = OptimConfig(lr=1.0, epochs=4, schedule="cosine", warmup_epochs=1)
    halfway, last = (learning_rate(config, step=step, epoch_steps=10) for step in (25, 39))
    assert halfway == pytest.approx(0.5)
    assert last == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 29 / 30))


@pytest.mark.parametrize(("name", "cls"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_named_optimizer_gets_its_settings(name: str, cls: type) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([weight], OptimConfig(name=name, lr=0.1, weight_decay=0.2))  # type: ignore[arg-type]
    assert type(optimizer) is cls
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.1, 0.2)


def test_a_step_goes_on_with_the_momentum_that_is_set() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([weight], OptimConfig(lr=9.0, momentum=0.5, weight_decay=0.0))
    for place in (-1.0, -2.5, -4.25):  # the speeds are 1, 1 + 0.5 and 1 + 0.75
        take_step(optimizer, [weight.sum()], lr=1.0)
        torch.testing.assert_close(weight.data, torch.full((2,), place))


def test_step_uses_the_given_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([weight], OptimConfig(lr=9.0, momentum=0.0, weight_decay=0.0))
    take_step(optimizer, [(weight * torch.tensor([30.0, 40.0])).sum()], lr=0.5)
    torch.testing.assert_close(weight.data, torch.tensor([-15.0, -20.0]))
    take_step(optimizer, [weight.sum()], lr=1.0)  # gradients do not pile up
    torch.testing.assert_close(weight.data, torch.tensor([-16.0, -21.0]))
    take_step(optimizer, (part * weight.sum() for part in (0.25, 0.75)), lr=1.0)  # those of one step do
    torch.testing.assert_close(weight.data, torch.tensor([-17.0, -22.0]))
