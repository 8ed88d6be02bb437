"""All that a training run needs to go on where it stopped, in one file that is replaced as a whole."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ivdr_deploy._console import print_text
from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import CheckpointError, FolderError, TrainingError
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import canonical_json
from train.cache import CachedVideos
from train.config import RunConfig
from train.distributed import rank

_FORMAT = 2
_STATE = re.compile(r"state-(\d+)\.pt")


@dataclass(kw_only=True)
class TrainState:
    """The changing parts of a run, and what they belong to.

    Batches, clips, augmentation and segment orders of a step are drawn from ``seed`` and the step's number alone, and
    torch's own generators, which dropout uses, are seeded with them.
    """

    module: nn.Module
    """The step: the network, and what else a step changes, such as a queue."""

    optimizer: torch.optim.Optimizer

    seed: int
    digest: str
    """Identity of settings and training videos, see ``run_digest``."""

    epoch_steps: int
    """Steps in an epoch."""

    step: int = 0
    """Steps taken."""

    log_bytes: int = 0
    """Length of ``metrics.csv``: lines beyond it belong to steps that are taken again."""

    metrics: dict[str, float] = field(default_factory=dict)
    """The latest line of the log."""

    validation: dict[str, float] = field(default_factory=dict)
    """What was measured after the latest epoch."""

    averages: dict[str, float] = field(default_factory=dict)
    """Moving averages, and the first loss; see ``train.health``."""

    alarms: list[dict[str, str]] = field(default_factory=list)
    """Those raised so far in a run that goes on."""

    @property
    def epoch_position(self) -> tuple[int, int]:
        """The epoch that the next step belongs to, and its place in it."""
        return divmod(self.step, self.epoch_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors, numbers, strings and containers of them."""
        return {
            "format": _FORMAT,
            "digest": self.digest,
            "seed": self.seed,
            "epoch_steps": self.epoch_steps,
            "step": self.step,
            "log_bytes": self.log_bytes,
            "metrics": dict(self.metrics),
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "validation": dict(self.validation),
            "averages": dict(self.averages),
            "alarms": [dict(alarm) for alarm in self.alarms],
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take over a state of the same run.

        Raises:
            CheckpointError: if it does not fit.
            FolderError: if it belongs to other settings or videos.
        """
        try:
            if values["format"] != _FORMAT:
                raise CheckpointError(
                    f"a training state of format {quoted(values['format'])}, expected {_FORMAT}"
                )
            for name in ("digest", "seed", "epoch_steps"):
                if values[name] != getattr(self, name):
                    theirs, ours = quoted(values[name]), quoted(getattr(self, name))
                    raise FolderError(
                        f"the training state belongs to another run ({name} {theirs}, here {ours})",
                        hint="give another out=, or go on with the settings and the training list it was begun with",
                    )
            self.module.load_state_dict(values["module"])
            self.optimizer.load_state_dict(values["optimizer"])
            self.step, self.log_bytes = int(values["step"]), int(values["log_bytes"])
            for name in ("metrics", "validation", "averages"):
                setattr(self, name, {str(key): float(value) for key, value in values[name].items()})
            self.alarms = [{str(key): str(text) for key, text in one.items()} for one in values["alarms"]]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            reason = reason_of(error, whole=True)
            raise CheckpointError(f"the training state does not fit this run ({reason})") from error

    def save(self, path: Path) -> None:
        """Write the state; ``path`` holds the old file or the whole new one, whatever happens.

        Raises:
            TrainingError: if a weight is not finite; the older file stays.
            OSError: if the file cannot be written; the older file stays.
        """
        weights = [value for value in self.module.state_dict().values() if value.is_floating_point()]
        if not all(bool(value.isfinite().all()) for value in weights):
            raise TrainingError(
                f"weights are not finite after step {self.step}",
                hint="lower optim.lr, or set optim.warmup_epochs",
            )
        packed = io.BytesIO()
        torch.save(self.state_dict(), packed)
        with atomic_path(path) as temporary:  # not torch.save: a full disk would be an error of its own kind
            temporary.write_bytes(packed.getbuffer())

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote; nothing in the file is executed.

        Raises:
            CheckpointError: if the file is missing or damaged.
            FolderError: if it is of another run.
        """
        if not path.is_file():
            raise CheckpointError(f"no training state at {path}")
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes torch's reader raise whatever it meets
            reason = reason_of(error, whole=True)
            raise CheckpointError(f"{path} is not a readable training state ({reason})") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds {type(values).__name__}, not a training state")
        self.load_state_dict(values)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device


def saved_states(folder: Path) -> list[Path]:
    """Return the states in a run folder, the newest first."""
    found = [
        (int(name[1]), path) for path in folder.glob("state-*.pt") if (name := _STATE.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def keep_state(state: TrainState, folder: Path, *, keep: int) -> None:
    """Save a state beside the ones before it, of which the newest are kept; for one process of several.

    Args:
        state: What to save.
        folder: The run folder.
        keep: How many states stay.

    Raises:
        TrainingError: if a weight is not finite; those before stay.
        OSError: if it cannot be written; those before stay.
    """
    if rank() > 0:
        return
    before = saved_states(folder)
    for path in before[
        max(1, keep - 1) :
    ]:  # first, so that no more space is needed than for ``keep`` of them
        path.unlink()
    try:
        state.save(folder / f"state-{state.step:08d}.pt")
    except (OSError, TrainingError):
        if before:
            print_text(
                f"step {state.step} could not be saved; {before[0]} is kept, and the same command goes on from it",
                style="yellow",
            )
        raise
    for path in saved_states(folder)[keep:]:
        path.unlink()


def load_newest(state: TrainState, folder: Path) -> Path:
    """Take over the newest state of a run folder that is whole, and say which are not; return its path.

    Raises:
        CheckpointError: if there is none that can be read.
        FolderError: if it is of another run.
    """
    paths = saved_states(folder)
    for path in paths:
        try:
            state.load(path)
        except CheckpointError as error:
            if path == paths[-1]:
                raise
            print_text(f"{error.message}; going on from the one before", style="yellow")
        else:
            _set_aside(paths[: paths.index(path)])
            return path
    raise CheckpointError(f"no training state in {folder}")


def _set_aside(damaged: Sequence[Path]) -> None:
    """Take damaged states out of those that are counted: a good one would be removed for them."""
    for path in damaged:
        if rank() == 0:
            path.replace(path.with_suffix(".damaged"))


def run_digest(config: RunConfig, cached: CachedVideos) -> str:
    """Return the SHA-256 (hex) over the settings that shape the weights, and the usable videos in their order."""
    without = {"out", "log_every", "data", "on_alarm", "keep_states"}
    settings = {name: value for name, value in to_dict(config).items() if name not in without}
    settings["cache_form"] = config.data.cache_form
    videos = [[item.uri, item.label] for item in cached.items]
    text = canonical_json({"config": settings, "videos": videos})
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
