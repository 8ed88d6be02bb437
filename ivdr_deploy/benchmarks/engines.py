"""Times the variants of a bundle against each other, each in a process of its own, in turns.

Two engines in one process disturb each other: torch's OpenMP threads go on spinning after a call, and slow a neighbour
by a third. So each has a process that stays, one runs while the others sleep, and a turn ends only when the threads
that it started have come to rest. What counts is the ratio of two turns of one round: a machine that becomes slower, or
is shared for a while, slows both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from ivdr_deploy import errors
from ivdr_deploy._console import Track, untracked
from ivdr_deploy._files import scratch_folder
from ivdr_deploy._text import one_line
from ivdr_deploy.artifacts.bundle import Bundle
from ivdr_deploy.artifacts.manifest import Variant
from ivdr_deploy.benchmarks.engine_process import Task
from ivdr_deploy.benchmarks.timing import LEAST_TURNS, median_interval, percentile
from ivdr_deploy.errors import ArtifactError, ConfigError, EngineIncompatibleError, InferenceError
from ivdr_deploy.runtimes.registry import REGISTRY, misfit
from ivdr_deploy.spec import Device

TURNS = 9
TURN_SECONDS = 0.5
_LAST_LINES, _LAST_BYTES = 3, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How many times as fast as the reference: the median over the rounds, with its 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What was measured."""

    reference: str
    """Id of the variant that the others are held against."""

    device: Device
    threads: int
    batch: int
    clip_shape: tuple[int, ...]
    runtimes: Mapping[str, str]
    """What ran, by the id of the variant."""

    order: tuple[str, ...]
    """Ids in the order in which they had their turns."""

    ms: Mapping[str, tuple[float, ...]]
    """Milliseconds of a call, the median of each turn, by the id of the variant."""

    def over_reference(self, variant: str) -> Ratio:
        """Compare a variant with the reference, round by round."""
        ratios = [ours / its for ours, its in zip(self.ms[self.reference], self.ms[variant], strict=True)]
        low, high = median_interval(ratios)
        return Ratio(median=percentile(ratios, 50), low=low, high=high)

    def ms_per_clip(self, variant: str) -> float:
        """Return the median over the turns."""
        return percentile(self.ms[variant], 50) / self.batch


class EngineProcess:
    """A process that holds one variant, opened as anybody opens it. A context manager.

    Args:
        task: What it runs.
        scratch: Folder for what it prints.
    """

    def __init__(self, task: Task, *, scratch: Path) -> None:
        self.variant = task.variant
        self._printed: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  # closed with the process
        command = [
            sys.executable,
            "-P",
            "-m",
            "ivdr_deploy.benchmarks.engine_process",
            json.dumps(asdict(task)),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            encoding="utf-8",
        )
        self.pid = self._process.pid

    def ready(self) -> str:
        """Wait until it is open; returns what runs.

        Raises:
            IvdrError: what it met when it opened the variant.
            InferenceError: if it died.
        """
        return str(self._read()["runtime"])

    def turn(self, seconds: float) -> list[float]:
        """Let it run; returns the milliseconds of each call once its threads are at rest. Raises as ``ready``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"seconds": seconds}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return list(self._read()["ms"])

    def close(self) -> None:
        """End it, whatever it does; calling it twice is allowed."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # what was still to be written; nobody reads it
                stream.close()
        self._printed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["error"])
            raise kind(f"{self.variant}: {answer['message']}", hint=answer["hint"])
        return answer

    def _died(self) -> InferenceError:
        code = self._process.wait()
        end = self._printed.seek(0, 2)
        self._printed.seek(max(0, end - _LAST_BYTES))
        lines = self._printed.read().decode("utf-8", "replace").splitlines()[-_LAST_LINES:]
        said = f"; its last lines: {one_line(' | '.join(lines))[-300:]}" if lines else ""
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return InferenceError(
            f"the process that timed {self.variant} {how}{said}",
            hint="it may have run out of memory; `ivdr verify BUNDLE --variant ID` runs it without timing it",
        )


def timed_variants(
    bundle: Bundle, names: Sequence[str] = (), *, device: Device
) -> tuple[list[Variant], dict[str, str]]:
    """Choose what to time besides the reference.

    Machine code is timed only where it is named: to load it is to run what is in it, and no file can prove that it was
    made here.

    Args:
        bundle: The bundle.
        names: Ids of variants, each timed once however often it is named; when empty every verified one that fits the
            device.
        device: Where they are to run.

    Returns:
        The variants, and for each that is left out the reason.

    Raises:
        ArtifactError: if the bundle lacks one of ``names``, or holds no reference.
        EngineIncompatibleError: if nothing is left, or one that was named does not fit.
    """
    reference = bundle.manifest.reference
    if reference is None:
        raise ArtifactError(
            f"{bundle.path} holds no reference to time the others against", hint="time the exported bundle"
        )
    asked = [bundle.variant(name) for name in dict.fromkeys(names)] or bundle.manifest.variants
    chosen, reasons = [], {}
    for variant in asked:
        if variant.id == reference.id:
            continue
        reason = "" if names else variant.unverified_reason
        if not reason and not names and REGISTRY[variant.runtime].machine_code:
            reason = "it is machine code, which runs only when it is named: --variant"
        if reason := reason or misfit(variant, device):
            reasons[variant.id] = reason
        else:
            chosen.append(variant)
    if not chosen or (names and reasons):
        found = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "there is only the reference"
        raise EngineIncompatibleError(f"{bundle.path}: nothing to time on {device} ({found})")
    return chosen, reasons


def time_variants(
    bundle: Bundle,
    variants: Sequence[Variant],
    *,
    device: Device,
    threads: int,
    clips: np.ndarray | None = None,
    batch: int = 1,
    turns: int = TURNS,
    turn_seconds: float | None = None,
    track: Track = untracked,
) -> Timing:
    """Time variants against the reference of a bundle.

    Args:
        bundle: The bundle.
        variants: Which ones, see ``timed_variants``.
        device: Where all of them run, the reference too.
        threads: Threads of each on a CPU.
        clips: uint8 (N, T, H, W, 3); the golden clips when None.
        batch: Clips in a call, at most N.
        turns: Rounds; in each every variant has one turn.
        turn_seconds: How long the timed calls of a turn go on, three of them at least; ``TURN_SECONDS`` when None.
        track: Shows progress.

    Raises:
        ConfigError: if ``turns`` is below ``LEAST_TURNS``, or ``batch`` above the number of clips.
        ArtifactError: if there are no clips, or no reference.
        IvdrError: what one of them met when it was opened.
        InferenceError: if the process of one dies.
    """
    if turns < LEAST_TURNS:
        raise ConfigError(f"turns must be at least {LEAST_TURNS} for a 95 % interval, found {turns}")
    reference = bundle.manifest.reference
    clips = bundle.golden().video if clips is None else clips
    if clips is None or reference is None:
        raise ArtifactError(
            f"{bundle.path} holds no golden clips or no reference, so that nothing can be timed"
        )
    if not 1 <= batch <= len(clips):
        raise ConfigError(f"batch must be between 1 and the number of clips, {len(clips)}, found {batch}")
    everyone, seconds = (reference, *variants), TURN_SECONDS if turn_seconds is None else turn_seconds
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder("ivdr-bench-"))
        np.save(scratch / "clips.npy", clips)
        engines = []
        for variant in everyone:  # one after the other: opening runs the golden clips, on all cores
            task = Task(
                bundle=str(bundle.path.resolve()),
                variant=variant.id,
                device=device,
                threads=threads,
                clips=str(scratch / "clips.npy"),
                batch=batch,
            )
            engines.append(stack.enter_context(EngineProcess(task, scratch=scratch)))
        runtimes = {engine.variant: engine.ready() for engine in engines}
        order = [engine for _ in range(turns) for engine in engines]
        ms: dict[str, list[float]] = {engine.variant: [] for engine in engines}
        for engine in track(order, len(order), "timing"):
            ms[engine.variant].append(percentile(engine.turn(seconds), 50))
    return Timing(
        reference=reference.id,
        device=device,
        threads=threads,
        batch=batch,
        clip_shape=bundle.manifest.clip.clip_shape,
        runtimes=runtimes,
        order=tuple(engine.variant for engine in order),
        ms={name: tuple(values) for name, values in ms.items()},
    )
