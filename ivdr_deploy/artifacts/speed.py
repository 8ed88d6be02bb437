"""How fast a variant was on one kind of machine: what a manifest keeps of a timing.

Standard library only, apart from what finds out about the machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ivdr_deploy._text import QUOTED, one_line, quoted
from ivdr_deploy.environment import cpu_model, engine_threads, first_gpu, instruction_sets
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import require_plain
from ivdr_deploy.spec import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A kind of machine, as far as it decides which variant is the fastest: figures hold where all is the same."""

    device: Device
    processor: str
    """Model of the CPU or of the GPU. In a virtual machine that may be as little as ``AMD EPYC``; empty where it is not
    known, and then figures hold nowhere."""

    instruction_sets: tuple[str, ...] = ()
    """Of a CPU, see ``environment.instruction_sets``; sorted."""

    threads: int = 0
    """Threads of the engine on a CPU; 0 on a GPU, where they do not matter."""

    @property
    def is_known(self) -> bool:
        """Whether it can be told from other kinds at all."""
        return bool(self.processor)

    def __str__(self) -> str:
        threads = f", {quoted(self.threads)} thread{'s' * (self.threads != 1)}" if self.threads else ""
        processor = one_line(self.processor[:QUOTED]) or f"an unknown {quoted(self.device)} device"
        return f"{processor}{threads}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What ``ivdr bench --speeds`` measured on one variant."""

    machine: Machine
    variant_sha256: str
    """Digest over the files of the variant, see ``ArtifactManifest.variant_sha256``: it belongs to these alone."""

    reference: str
    """Id of the variant that it took turns with; its own where it is the reference."""

    over_reference: float
    """How many times as fast as the reference: the median over the turns."""

    low: float
    high: float
    """95 % interval of that median."""

    ms_per_clip: float
    """Median over the turns, in milliseconds."""

    turns: int
    batch: int
    """Clips in a call."""

    clip_shape: tuple[int, ...]
    runtime: str
    """What ran: library, version, device, precision."""

    load_average: float | None = None
    """Of the machine over the minute before, other processes included; None where the system does not tell."""

    measured_at: str
    """UTC time, ISO 8601."""

    def __post_init__(self) -> None:
        require_plain("runtime", self.runtime)
        require_plain("time", self.measured_at)
        figures = (self.low, self.over_reference, self.high, self.ms_per_clip)
        if not all(0 < value < math.inf for value in figures) or not (
            self.low <= self.over_reference <= self.high
        ):
            raise ConfigError(
                f"a speed of {self.over_reference:g} times the reference, {self.low:g} to {self.high:g}, in "
                f"{self.ms_per_clip:g} ms cannot have been measured"
            )

    def __str__(self) -> str:
        clips = "a clip" if self.batch == 1 else f"a clip in calls of {quoted(self.batch)}"
        took = f"{self.ms_per_clip:.1f} ms {clips} on {self.machine}"
        if self.low == self.high:  # the reference against itself
            return took
        against = one_line(self.reference[:QUOTED])
        return (
            f"{self.over_reference:.2f} [{self.low:.2f}, {self.high:.2f}] times as fast as {against}, {took}"
        )


def this_machine(device: Device, threads: int | None = None) -> Machine:
    """Describe the machine that this process runs on.

    Args:
        device: Where the network runs.
        threads: Threads of the engine on a CPU; those that it is given unasked when None.
    """
    if device == "cuda":
        return Machine(device=device, processor=first_gpu())
    return Machine(
        device=device,
        processor=cpu_model(),
        instruction_sets=tuple(sorted(instruction_sets())),
        threads=threads or engine_threads(),
    )
