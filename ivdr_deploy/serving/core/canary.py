"""Asks the network for a golden clip during service, so that busy, stuck and wrong are told apart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

from ivdr_deploy._text import reason_of
from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.batching import Inferred
from ivdr_deploy.runtimes.compare import compare_outputs, describe_failures
from ivdr_deploy.spec import Precision

Health = Literal["ready", "stuck", "wrong"]
"""``ready``: it answers right, however much waits. ``stuck``: it does not answer. ``wrong``: it fails, or gives
something else than when it was proved."""


class Canary:
    """Looks after one network, in a thread of its own. A context manager.

    Args:
        ask: Runs the golden clips ahead of what waits, so that only the call that runs is waited for.
        golden: The clips and what they give.
        precision: Of the network; picks the tolerance.
        every_seconds: From one answer to the next question.
        patience_seconds: After which a network counts as stuck: longer than any call takes.
    """

    def __init__(
        self,
        ask: Callable[[], Future[Inferred]],
        golden: Golden,
        *,
        precision: Precision,
        every_seconds: float,
        patience_seconds: float,
    ) -> None:
        self._ask, self._golden, self._precision = ask, golden, precision
        self._every, self._patience = every_seconds, patience_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="canary", daemon=True)
        self._said: tuple[Health, str] = ("ready", "")

    @property
    def said(self) -> tuple[Health, str]:
        """What is known now, and why."""
        return self._said

    def __enter__(self) -> Canary:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join(self._every)  # one that waits for a stuck network ends with the process

    def _run(self) -> None:
        while not self._closing.wait(self._every):
            try:
                asked = self._ask()
            except Exception as error:  # noqa: BLE001  # a canary that is gone would say "ready" for ever
                self._said = ("wrong", reason_of(error))
                continue
            answered = threading.Event()
            asked.add_done_callback(lambda _, answered=answered: answered.set())  # type: ignore[misc]
            if not answered.wait(self._patience):
                self._said = ("stuck", f"the network has not answered for {self._patience:g} s")
                answered.wait()
            self._said = self._judged(asked)

    def _judged(self, asked: Future[Inferred]) -> tuple[Health, str]:
        if (error := asked.exception()) is not None:
            return "wrong", reason_of(error)
        parity = compare_outputs(self._golden.expected, asked.result().outputs, precision=self._precision)
        failures = describe_failures(parity)
        return (
            ("wrong", f"a golden clip gives something else: {failures[:200]}") if failures else ("ready", "")
        )
