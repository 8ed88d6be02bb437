"""What a scoring run executes, as it is told to the process that does, and what the two say to each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ivdr_deploy._text import quoted
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.scoring.plan import RunPlan, ScoreOptions
from ivdr_deploy.scoring.stage import InProcess
from ivdr_deploy.spec import DecoderName, Device
from ivdr_deploy.video.reader import VideoLimits

NEXT, ROW, DONE, READY, FAILED = "next", "row", "done", "ready", "failed"
"""What a worker says: give me a group; the row of an input; it was the last of its group, may I go on; the model is
open; an error that would hit every input."""

FLUSH = None
"""The answer to ``NEXT`` after which what was asked for so far is finished before more is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a worker runs."""

    artifact: Path
    variant: str | None = None
    device: Device | None = None
    threads: int | None = None
    decoder: DecoderName = "pyav"
    limits: VideoLimits = field(default_factory=VideoLimits)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    options: ScoreOptions = field(default_factory=ScoreOptions)
    num_clips: int | None = None
    """Clips of a video instead of the number in the model's view plan."""

    share: str = ""
    gpu: int | None = None
    """Which of the GPUs that can be seen; None: whichever is the first."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What a worker says about its model."""

    plan: RunPlan
    manifest: Mapping[str, Any]
    call_videos: int
    """Videos that share a call of the network."""


@contextmanager
def open_predictor(task: Task) -> Iterator[InProcess]:
    """Open the model of a task in this process.

    Raises:
        IvdrError: if it cannot be opened, or does not have what the options ask for.
    """
    model = open_model(
        task.artifact, variant=task.variant, device=task.device, threads=task.threads, decoder=task.decoder
    )
    options = task.options
    if task.num_clips is not None:
        options = replace(options, view_plan=replace(model.view_plan, num_clips=task.num_clips))
    predictor = VideoPredictor(model, limits=task.limits, decoder=task.decoder, decode=task.decode)
    with model.runtime, predictor:
        yield InProcess(predictor, options, share=task.share)


def parse_devices(text: str) -> tuple[int, ...]:
    """Read numbers of GPUs, ``0,1``.

    Raises:
        ConfigError: if it is something else.
    """
    names = text.split(",")
    if not all(name.isascii() and name.isdecimal() and len(name) < 4 for name in names):
        raise ConfigError(
            f"{quoted(text)} is no list of GPUs", hint="such as 0,1; nvidia-smi shows the numbers"
        )
    return tuple(map(int, names))
