"""A place for a worker, in which there is a new one whenever one has died."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import IvdrError, ServerError, WorkerDiedError
from ivdr_deploy.serving.core.metrics import METRICS, REQUESTS, Series, added
from ivdr_deploy.serving.http.channel import Message
from ivdr_deploy.serving.http.worker_process import Launch, WorkerProcess

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often a worker is asked how it is. That it has ended is seen at once."""

STEADY_SECONDS = 30.0
"""A worker that has answered this long counts as sound: what happens to it later is counted anew."""

MOST_FAILURES = 5
"""In a row, after which a worker is not started again unless others serve meanwhile."""

_LONGEST_PAUSE_SECONDS = 30.0

_DIED = Series(REQUESTS.name, REQUESTS, ((REQUESTS.label, WorkerDiedError.code),))

_SAME = ("name", "version", "contract_hash", "labels", "outputs")
"""What every worker of a slot must say of its model as the first did; see ``InferenceService.describe``."""


class Slot:
    """A place for one worker, in which there is a new one whenever one has died. Runs in a thread of its own.

    Args:
        launch: How workers are started.
        name: For messages.
        may_give_up: Whether to end instead of going on when one after the other has failed.
        on_given_up: Called then, with the reason; no other worker follows.
    """

    def __init__(
        self,
        launch: Launch,
        name: str,
        *,
        may_give_up: Callable[[], bool],
        on_given_up: Callable[[str], None],
    ) -> None:
        self._launch, self._name = launch, name
        self._may_give_up, self._on_given_up = may_give_up, on_given_up
        self._lock = threading.Lock()
        self._ordering = threading.Lock()
        """Held while a worker is told whether to serve, which may take it a while: whoever counts does not wait."""

        self._wake, self._closing = threading.Event(), threading.Event()
        self._first = threading.Event()
        self._failure: Exception | None = None
        self._serving = False
        self._proved_at = math.inf
        self._proved: WorkerProcess | None = None
        self._counted: dict[Series, float] = {}
        self._kept: dict[Series, float] = {}
        self.facts: Message = {}
        self.restarts = 0
        """How often a worker followed one that had died or had to be replaced."""

        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait_first(self) -> None:
        """Wait for the first worker to be proved.

        Raises:
            IvdrError: that it met; none follows it.
        """
        self._first.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def worker(self) -> WorkerProcess | None:
        """The worker, if there is one that is proved."""
        return self._proved

    def serve(self, serving: bool) -> None:
        """Let the worker, and those that follow it, accept connections or not.

        Raises:
            ServerError: if it does not answer; the next one will do it.
        """
        with self._ordering:
            self._serving = serving
            if (worker := self._proved) is not None:
                worker.ask("serve" if serving else "pause")

    def counted(self) -> dict[Series, float]:
        """Return what this worker and those before it have counted."""
        worker = self._proved
        if worker is not None:
            with suppress(ServerError):
                self._look(worker, seconds=2.0)
        with self._lock:
            return added(self._kept, self._counted)

    def close(self) -> None:
        """Begin to end: no connections are accepted, and ``join`` returns when all that was taken is answered."""
        self._closing.set()
        self._wake.set()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._keep_one()
        except Exception as error:
            self._failure = ServerError(f"unexpected {type(error).__name__} ({reason_of(error)})")
            self._on_given_up(f"{self._name} is no longer looked after: {self._failure.message}")
            raise  # a defect of ours: its traceback belongs into the log
        finally:
            if not self._first.is_set():
                self._failure = self._failure or ServerError("the server is stopping")
                self._first.set()

    def _keep_one(self) -> None:
        failures = 0
        while not self._closing.is_set():
            self._proved_at = math.inf
            reason = self._one_worker()
            if self._closing.is_set() or not self._first.is_set():
                break
            failures = 1 if time.monotonic() - self._proved_at >= STEADY_SECONDS else failures + 1
            logger.error("%s has failed: %s", self._name, reason)
            if failures >= MOST_FAILURES and self._may_give_up():
                self._on_given_up(f"{self._name} failed {failures} times in a row, the last time: {reason}")
                break
            self.restarts += 1
            self._closing.wait(pause_seconds(failures))

    def _one_worker(self) -> str:
        """Start a worker and look after it until it has ended; return why."""
        try:
            worker = WorkerProcess(self._launch, self._name, on_news=self._wake.set)
        except ServerError as error:
            self._failure = error
            return error.message
        reason: IvdrError | None = None
        try:
            self._watch(worker)
        except IvdrError as error:
            reason = error
        with self._lock:
            proved, self._proved = self._proved, None
        last = worker.end(self._launch.settings.stop_seconds) if proved and reason is None else None
        ended = worker.kill()
        with self._lock:
            counted = _series(last["counted"]) if last else self._counted
            self._kept = added(self._kept, _lasting(counted), {_DIED: float(worker.unanswered)})
            self._counted = {}
        if isinstance(reason, ServerError):
            said = f"{reason.message}; its process {ended}, and {worker.unanswered} requests were told to come again"
            reason = ServerError(said, hint=reason.hint)
        if not self._first.is_set():
            self._failure = reason
        return str(reason)

    def _watch(self, worker: WorkerProcess) -> None:
        """Wait for a worker and look after it; return when the end is asked for.

        Raises:
            IvdrError: if it is not well, or has ended.
        """
        self._await_loaded(worker)
        if self._closing.is_set():
            return
        facts = worker.facts()
        self._require_same(facts)
        with self._ordering:
            with self._lock:
                self.facts, self._proved = facts, worker
            if self._serving:
                worker.ask("serve")
        self._first.set()
        self._proved_at = time.monotonic()
        while not self._closing.is_set():
            self._wake.clear()
            self._look(worker)
            if not self._closing.is_set():
                self._wake.wait(LOOK_SECONDS)

    def _require_same(self, facts: Message) -> None:
        """Refuse a worker that found another model in the folder than the first one, whose place it is to take.

        Raises:
            ServerError: if it did.
        """
        if not self.facts:
            # Those that follow take the same, also if another one is the best by then.
            service = replace(self._launch.settings.service, variant=facts["variant"])
            self._launch = replace(self._launch, settings=replace(self._launch.settings, service=service))
            return
        if changed := [name for name in _SAME if facts[name] != self.facts[name]]:
            name = changed[0]
            raise ServerError(
                f"{self._launch.bundle} is another bundle now than when it was loaded: its {name} is "
                f"{quoted(facts[name])}, and {quoted(self.facts[name])} serves",
                hint="put the former one back, and another one beside it for `ivdr serve --update`",
            )

    def _await_loaded(self, worker: WorkerProcess) -> None:
        seconds = self._launch.settings.startup_seconds
        deadline = time.monotonic() + seconds
        while not worker.loaded and not self._closing.is_set():
            if not self._wake.wait(max(0.0, deadline - time.monotonic())):
                raise ServerError(
                    f"the model was not loaded within {seconds:g} s", hint="raise startup_seconds"
                )
            self._wake.clear()

    def _look(self, worker: WorkerProcess, *, seconds: float | None = None) -> None:
        """Ask a worker how it is.

        Raises:
            ServerError: if it is not well, or is gone.
        """
        said = worker.ask("status", seconds=seconds)
        with self._lock:
            if self._proved is worker:
                self._counted = _series(said["counted"])
        if said["health"] != "ready":
            raise ServerError(f"its network is {said['health']} ({said['reason']})")


def pause_seconds(failures: int) -> float:
    """Return how long to wait before the next worker, after so many have failed in a row."""
    return 0.0 if failures == 1 else min(_LONGEST_PAUSE_SECONDS, 0.25 * 2.0 ** min(failures - 2, 20))


def _series(counted: list[Any]) -> dict[Series, float]:
    """Make series of what a worker sent; see ``worker.Worker``."""
    known = {metric.name: metric for metric in METRICS}
    return {
        Series(name, known[metric], tuple((key, text) for key, text in labels)): value
        for name, metric, labels, value in counted
    }


def _lasting(values: dict[Series, float]) -> dict[Series, float]:
    """Leave out what ends with a process: a gauge says how it is now."""
    return {series: value for series, value in values.items() if series.metric.kind != "gauge"}
