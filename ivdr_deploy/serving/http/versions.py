"""The versions of a model that are loaded: one answers, one is kept for the way back, others come and go."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ivdr_deploy.errors import ConfigError, ServerError
from ivdr_deploy.serving.core.metrics import Metric, Series, added
from ivdr_deploy.serving.http.channel import Message
from ivdr_deploy.serving.http.generation import Generation
from ivdr_deploy.serving.http.run_folder import Record, RunFolder, Say
from ivdr_deploy.serving.http.shadow import check_replacement, compare_answers, described
from ivdr_deploy.serving.http.worker_process import Launch

logger = logging.getLogger(__name__)

WORKERS = Metric(name="ivdr_workers", kind="gauge", unit="count", help="workers whose network answers right")
RESTARTS = Metric(
    name="ivdr_worker_restarts_total",
    kind="counter",
    unit="count",
    help="workers that followed one which had died, was stuck or answered wrong",
)


class Versions:
    """Loads versions, changes from one to another, and ends them. Safe to use from many threads.

    Args:
        launch: How workers are started; its bundle is the first one.
        folder: Where it is recorded which bundle serves.
        record: What is recorded there of the first one.
        on_failed: Called with the reason when no worker of the version that answers can be kept running.
    """

    def __init__(
        self, launch: Launch, folder: RunFolder, record: Record, *, on_failed: Callable[[str], None]
    ) -> None:
        self._launch, self._folder, self._on_failed = launch, folder, on_failed
        self._started_with = record.started_with
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._closing = False
        self._generations: list[Generation] = []
        self._current: Generation | None = None
        self._previous: Generation | None = None
        self._retired: dict[Series, float] = {}
        self._restarts = 0

    @property
    def current(self) -> Generation:
        """The version that answers."""
        assert self._current is not None
        return self._current

    @property
    def previous(self) -> Generation | None:
        """The one that ``rollback`` goes back to at once, if it is loaded."""
        return self._previous

    def begin(self) -> None:
        """Load the first one, and let it answer.

        Raises:
            IvdrError: that a worker of it met.
        """
        self._current = self._start(self._launch.bundle)
        self._current.serve()

    def counted(self) -> dict[Series, float]:
        """Return what all workers have counted, those that are gone included."""
        with self._lock:
            generations, retired, restarts = list(self._generations), self._retired, self._restarts
        found = added(retired, *(generation.counted() for generation in generations))
        restarts += sum(generation.restarts for generation in generations)
        found[Series(WORKERS.name, WORKERS)] = float(len(self.current.ready))
        found[Series(RESTARTS.name, RESTARTS)] = float(restarts)
        return found

    def update(self, bundle: Path, videos: list[Path], *, min_agreement: float, say: Say) -> Message:
        """Bring up another bundle beside the one that serves, hold their answers against each other, and change over.

        Args:
            bundle: The other one.
            videos: What both answer for.
            min_agreement: Share of equal labels that is needed.
            say: Told how far it is; what it raises gives the update up.

        Returns:
            ``shadow``, the report, and ``switched``: whether the other one answers now.

        Raises:
            ServerError: if another change is under way.
            IvdrError: if it cannot be loaded, or is no replacement; the one that serves goes on.
        """
        if not videos:
            raise ConfigError(
                "there is no video to compare the two versions on", hint="name some with --videos"
            )
        with self._change():
            check_replacement(self.current.facts, described(bundle))
            say({"say": f"loading {bundle} beside {self.current.label}"})
            candidate = self._start(bundle)
            try:
                check_replacement(
                    self.current.facts, candidate.facts
                )  # of what was loaded: a folder may change
                say({"say": f"comparing {candidate.label} with {self.current.label}"})
                seconds = float(self._launch.settings.stop_seconds)
                shadow = compare_answers(
                    lambda video: self.current.predict(video, seconds=seconds),
                    lambda video: candidate.predict(video, seconds=seconds),
                    videos,
                    min_agreement=min_agreement,
                    on_done=lambda done: say({"done": done, "of": len(videos)}),
                )
                if shadow.passed:
                    self._switch(candidate)
            finally:
                if candidate is not self._current:
                    self._retire(candidate)
            return {"shadow": shadow.to_dict(), "switched": shadow.passed, "serving": self.current.label}

    def rollback(self, say: Say) -> Message:
        """Let the version before the last change answer again.

        Raises:
            ServerError: if there is none, or another change is under way.
            IvdrError: if it has to be loaded again, which it has to after a restart, and cannot be.
        """
        with self._change():
            previous = self._previous
            if previous is None:
                record = self._folder.read()
                if record is None or record.previous is None:
                    raise ServerError("there is no earlier version to go back to", hint="")
                say({"say": f"loading {record.previous}"})
                previous = self._start(Path(record.previous))
            try:
                check_replacement(self.current.facts, previous.facts, backwards=True)
                self._switch(previous)
            finally:
                if previous is not self._current and previous is not self._previous:
                    self._retire(previous)
            return {"switched": True, "serving": self.current.label}

    def close(self) -> None:
        """Begin to end: no connections are accepted, and ``join`` returns when all that was taken is answered."""
        with self._lock:
            self._closing = True
            generations = list(self._generations)
        for generation in generations:
            generation.close()

    def join(self) -> None:
        """Wait for the end of all versions."""
        with self._lock:
            generations = list(self._generations)
        for generation in generations:
            generation.join()

    @contextmanager
    def _change(self) -> Iterator[None]:
        if not self._changing.acquire(blocking=False):
            raise ServerError("another change of version is under way", hint="wait for its end")
        try:
            yield
        finally:
            self._changing.release()

    def _start(self, bundle: Path) -> Generation:
        generation = Generation(replace(self._launch, bundle=bundle), on_given_up=self._given_up)
        with self._lock:
            if self._closing:
                raise ServerError("the server is stopping")
            self._generations.append(generation)
        try:
            generation.start()
        except BaseException:
            with self._lock:
                self._generations.remove(generation)
            raise
        return generation

    def _switch(self, new: Generation) -> None:
        """Let another version answer; the one before stays, loaded, for the way back."""
        old, before = self.current, self._previous
        new.serve()
        record = Record(started_with=self._started_with, serving=str(new.bundle), previous=str(old.bundle))
        try:
            self._folder.write(record)
        except OSError as error:
            new.pause()
            raise ServerError(
                f"which version serves cannot be written into {self._folder.path} ({error.strerror}), so that "
                f"{old.label} goes on",
                hint="make room there, and give the order again",
            ) from error
        self._current, self._previous = new, old
        old.pause()
        logger.warning("%s answers now, %s is kept", new.label, old.label)
        if before is not None and before is not new:
            self._retire(before)

    def _retire(self, generation: Generation) -> None:
        """End a version when it has answered what it had taken; what it counted stays."""

        def end() -> None:
            generation.close()
            generation.join()
            counted = generation.counted()
            with self._lock:
                if generation not in self._generations:  # it failed while it was being left
                    return
                self._generations.remove(generation)
                self._restarts += generation.restarts
                self._retired = added(self._retired, counted)

        threading.Thread(target=end, name="retire", daemon=True).start()

    def _given_up(self, generation: Generation, reason: str) -> None:
        """Hear that a version has no worker left; runs in the thread of one of its slots."""
        if generation is self._current:
            self._on_failed(reason)
        elif generation is self._previous:
            logger.error("%s is not kept any longer: %s", generation.label, reason)
            self._previous = None
            self._retire(generation)
