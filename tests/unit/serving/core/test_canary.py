"""The canary tells a network that answers right from one that is stuck, and from one that answers wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from served import wait_for

from ivdr_deploy.batching import Inferred
from ivdr_deploy.errors import ClosedError, InferenceError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.core.canary import Canary
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ServiceSettings


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> Iterator[InferenceService]:
    with InferenceService(open_model(tiny_bundle, threads=1), ServiceSettings(decode_workers=1)) as opened:
        yield opened


@contextmanager
def watched(service: InferenceService, ask: Callable[[], Future[Inferred]]) -> Iterator[Canary]:
    golden = service.model.golden
    assert golden is not None
    with Canary(ask, golden, precision="fp32", every_seconds=0.01, patience_seconds=0.2) as canary:
        yield canary


def answered(outputs: dict[str, np.ndarray] | Exception) -> Future[Inferred]:
    future: Future[Inferred] = Future()
    if isinstance(outputs, Exception):
        future.set_exception(outputs)
    else:
        future.set_result(Inferred(outputs=outputs, infer_ms=1.0, batch_clips=1))
    return future


def test_the_network_that_was_proved_is_ready(service: InferenceService) -> None:
    canary = service.canary(every_seconds=0.01, seconds_per_clip=1.0)
    assert canary is not None
    asked: list[int] = []
    ask = canary._ask
    canary._ask = lambda: asked.append(1) or ask()  # type: ignore[func-returns-value]
    with canary:
        wait_for(lambda: len(asked) > 3)
        assert canary.said == ("ready", "")


def test_an_answer_that_changed_is_wrong_until_it_is_right_again(service: InferenceService) -> None:
    golden = service.model.golden
    assert golden is not None
    right = dict(golden.expected)
    given = {"now": right}
    with watched(service, lambda: answered(given["now"])) as canary:
        given["now"] = {name: value + 0.1 for name, value in right.items()}
        wait_for(lambda: canary.said[0] == "wrong")
        assert "logits" in canary.said[1]
        given["now"] = right
        wait_for(lambda: canary.said[0] == "ready")


@pytest.mark.parametrize("error", [InferenceError("the network failed"), ClosedError("it was closed")])
def test_a_network_that_fails_is_wrong(service: InferenceService, error: Exception) -> None:
    def raises() -> Future[Inferred]:
        raise error

    for ask in (lambda: answered(error), raises):
        with watched(service, ask) as canary:
            wait_for(lambda canary=canary: canary.said == ("wrong", str(error)))  # type: ignore[misc]


def test_a_network_that_does_not_answer_is_stuck_until_it_does(service: InferenceService) -> None:
    golden = service.model.golden
    assert golden is not None
    late: Future[Inferred] = Future()
    with watched(service, lambda: late) as canary:
        wait_for(lambda: canary.said[0] == "stuck")
        assert "0.2 s" in canary.said[1]
        late.set_result(Inferred(outputs=dict(golden.expected), infer_ms=1.0, batch_clips=1))
        wait_for(lambda: canary.said[0] == "ready")


def test_a_question_that_cannot_even_be_asked_is_wrong(service: InferenceService) -> None:
    def fail() -> Future[Inferred]:
        raise RuntimeError("can't start new thread")

    with watched(service, fail) as canary:
        wait_for(lambda: canary.said == ("wrong", "can't start new thread"))
