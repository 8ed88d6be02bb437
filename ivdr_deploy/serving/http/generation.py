"""One version of a model in service: its workers, which share a port with those of other versions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ivdr_deploy.errors import IvdrError, ServerError
from ivdr_deploy.serving.core.metrics import Series, added
from ivdr_deploy.serving.http.channel import Message
from ivdr_deploy.serving.http.slot import Slot
from ivdr_deploy.serving.http.worker_process import Launch, WorkerProcess


class Generation:
    """The workers of one bundle, looked after until ``close``.

    Args:
        launch: How they are started.
        on_given_up: Called with this and the reason when one has failed too often and no other is left.
    """

    def __init__(self, launch: Launch, *, on_given_up: Callable[[Generation, str], None]) -> None:
        self.launch = launch
        self._on_given_up = on_given_up
        self._slots: list[Slot] = []
        self._closing = False

    @property
    def bundle(self) -> Path:
        """Its folder."""
        return self.launch.bundle

    @property
    def facts(self) -> Message:
        """What a worker said about itself when it was ready; see ``InferenceService.describe``."""
        return self._slots[0].facts

    @property
    def label(self) -> str:
        """Name and version of the model, for messages."""
        return f"{self.facts['name']} {self.facts['version']}"

    def start(self) -> None:
        """Start the workers, and wait until the golden clips and videos of each agree. They do not serve yet.

        Raises:
            IvdrError: that one of them met; nothing is left running.
        """
        self._slots = [
            Slot(
                self.launch,
                f"worker {number}",
                may_give_up=lambda: not self.ready,
                on_given_up=lambda reason: self._on_given_up(self, reason),
            )
            for number in range(1, self.launch.settings.workers + 1)
        ]
        if self._closing:  # just now, before there was anything to close
            self.close()
        try:
            for slot in self._slots:
                slot.wait_first()
        except BaseException:
            self.close()
            self.join()
            raise

    def serve(self) -> None:
        """Accept connections.

        Raises:
            ServerError: if no worker is there that could; those that follow will.
        """
        self._each(True)
        if not self.ready:
            raise ServerError(f"no worker of {self.label} is left", hint="the log says why")

    def pause(self) -> None:
        """Accept no more connections; what was taken is answered."""
        self._each(False)

    def close(self) -> None:
        """Begin to end: no connections are accepted, and ``join`` returns when all that was taken is answered."""
        self._closing = True
        for slot in self._slots:
            slot.close()

    def join(self) -> None:
        """Wait for the end."""
        for slot in self._slots:
            slot.join()

    @property
    def ready(self) -> list[WorkerProcess]:
        """The workers that are proved and have not been found wrong, stuck or dead."""
        return [worker for slot in self._slots if (worker := slot.worker) is not None]

    @property
    def restarts(self) -> int:
        """How often a worker followed one that had died or had to be replaced."""
        return sum(slot.restarts for slot in self._slots)

    def predict(self, video: Path, *, seconds: float) -> Message:
        """Have one worker answer for a video as for a request: ``status`` and ``body``.

        Raises:
            ServerError: if there is none, or it does not answer in time.
        """
        ready = self.ready
        if not ready:
            raise ServerError(f"no worker of {self.label} is there", hint="the log says why")
        return ready[0].ask("predict", seconds=seconds, path=str(video))

    def counted(self) -> dict[Series, float]:
        """Return what its workers have counted, those that are gone included."""
        return added(*(slot.counted() for slot in self._slots))

    def describe(self) -> dict[str, Any]:
        """Say what is loaded, in the form in which TorchServe does."""
        workers = [
            {
                "id": str(number),
                "status": "READY" if worker else "LOADING",
                **({"pid": worker.pid} if worker else {}),
            }
            for number, worker in enumerate(slot.worker for slot in self._slots)
        ]
        return {
            "modelName": self.facts["name"],
            "modelVersion": self.facts["version"],
            "minWorkers": len(self._slots),
            "workers": workers,
            "customizedMetadata": self.facts,
        }

    def _each(self, serving: bool) -> None:
        for slot in self._slots:
            with suppress(IvdrError):  # it is gone, and the one that follows knows
                slot.serve(serving)
