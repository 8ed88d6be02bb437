"""Measuring while fine-tuning goes on: a held-out list now and then, the best weights kept, an early end."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ivdr_deploy._console import print_text
from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import FolderError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import CheckpointInfo
from ivdr_deploy.video.reader import VideoLimits
from train.config import FinetuneConfig
from train.evaluate import evaluate_model, open_in_memory
from train.loop import AfterLine
from train.report import EvaluationReport
from train.run import CHECKPOINT_NAME, decode_options
from train.run_page import VALIDATION_NAME, write_run_page
from train.state import TrainState

BEST_NAME = "best.safetensors"
_COLUMNS = ("step", "video_accuracy", "low", "high", "clip_accuracy")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    step: int
    video_accuracy: float
    low: float
    high: float
    clip_accuracy: float


class WriteCheckpoint(Protocol):
    """Writes a checkpoint of the network in training into the run folder."""

    def __call__(self, info: CheckpointInfo, metrics: Mapping[str, float], name: str) -> Path:
        """Return its path."""


class Validation:
    """Measures a network in training, on copies of it: measuring would change the layout of its weights.

    Rows are kept in ``validation.csv``. Those of steps that a resumed run takes again are dropped when it is opened.

    Args:
        config: The settings, with ``data.validation``.
        model: The network in training.
        state: Of the run.
        videos: What to measure on.
        info_after: What a checkpoint after so many steps says of itself.
        write: Writes one.
        show: Called with each measurement, when its row is on disk.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: VideoModel,
        state: TrainState,
        videos: VideoList,
        *,
        info_after: Callable[[int], CheckpointInfo],
        write: WriteCheckpoint,
        show: Callable[[int, EvaluationReport], None],
    ) -> None:
        self._config, self._model, self._state, self._videos = config, model, state, videos
        self._info_after, self._write, self._show = info_after, write, show
        self._path = Path(config.out) / VALIDATION_NAME
        self._every = max(1, round(config.validate_every * state.epoch_steps))
        self._total = state.epoch_steps * config.optim.epochs
        self.rows = [row for row in read_rows(self._path) if row.step <= state.step]

    @property
    def best(self) -> Row | None:
        """The measurement with the highest accuracy, of equals the first; None where there is none."""
        return max(self.rows, key=lambda row: (row.video_accuracy, -row.step)) if self.rows else None

    @property
    def stopped(self) -> bool:
        """Whether the latest measurements were no better than an earlier one for as long as is waited."""
        if not self._config.patience or self.best is None:
            return False
        return len([row for row in self.rows if row.step > self.best.step]) >= self._config.patience

    def after_line(self) -> AfterLine:
        """Measure when it is time, and say whether training is to end."""
        step = self._state.step
        measured = self.rows[-1].step if self.rows else 0
        if step == measured or (step - measured < self._every and step != self._total):
            return "go on"
        info = self._info_after(step)
        opened = open_in_memory(copy.deepcopy(self._model), info, device=self._config.device)
        limits = VideoLimits.allowing(self._config.data.allow_containers)
        with opened.runtime:
            report = evaluate_model(opened, self._videos, limits=limits, decode=decode_options(self._config))
        row = _row(step, report)
        self.rows.append(row)
        if self.best is row:
            self._write(info, self.metrics(), BEST_NAME)
        write_rows(self._path, self.rows)
        self._show(step, report)
        note = ", the best so far" if self.best is row else ""
        print_text(f"step {step}: validation accuracy {report.video_estimate}{note}")
        if self.stopped and step != self._total:
            print_text(
                f"ends early: no better in {self._config.patience} measurements than at step {self._best_step}",
            )
            return "end"
        return "save"

    @property
    def _best_step(self) -> int:
        assert self.best is not None
        return self.best.step

    def metrics(self) -> dict[str, float]:
        """Return what a checkpoint records of the best measurement; nothing before the first."""
        if self.best is None:
            return {}
        return {
            "validation_accuracy": self.best.video_accuracy,
            "validation_videos": len(self._videos.items),
            "best_step": self.best.step,
        }


def open_validation(
    config: FinetuneConfig,
    model: VideoModel,
    state: TrainState,
    *,
    info_after: Callable[[int], CheckpointInfo],
    write: WriteCheckpoint,
    videos: VideoList,
    facts: Sequence[tuple[str, str]],
) -> Validation | None:
    """Open the validation that the settings ask for; None where they name no list.

    Args:
        config: The settings.
        model: The network in training.
        state: Of the run.
        info_after: See ``Validation``.
        write: See ``Validation``.
        videos: The training list, for the page.
        facts: Of the training data, for the page.

    Raises:
        DataError: if the list is unusable, or has a class that training does not.
        FolderError: if the run has ended early, or was measured on another list so far.
    """
    if not config.data.validation:
        return None
    held = read_video_list(config.data.validation, root=config.data.root or None, part="test")
    held.targets(info_after(state.step).labels)
    held.require_files()
    total = state.epoch_steps * config.optim.epochs

    def show(step: int, report: EvaluationReport) -> None:
        write_run_page(config, videos, state=f"step {step} of {total}", test=held, report=report, facts=facts)

    found = Validation(config, model, state, held, info_after=info_after, write=write, show=show)
    if found.rows:
        _require_same_list(config, held)
    if found.stopped and (Path(config.out) / CHECKPOINT_NAME).exists():
        raise FolderError(
            f"the run in {config.out} has ended early, after {state.step} of {total} steps",
            hint="give another out= to train again",
        )
    return found


def _require_same_list(config: FinetuneConfig, held: VideoList) -> None:
    """Refuse to look for the best among measurements on two lists; the best so far says which it is of."""
    best = Path(config.out) / BEST_NAME
    if not best.is_file():
        return
    provenance = read_checkpoint_info(best).provenance
    before = (provenance.config["data"]["validation"], provenance.metrics["validation_videos"])
    now = (to_dict(config.data.validation), len(held.items))
    if before != now:
        raise FolderError(
            f"the run in {config.out} was measured on {quoted(before[0])} so far, {before[1]:.0f} videos; "
            f"data.validation is now {quoted(now[0])}, {now[1]} videos",
            hint="go on with that list, or give another out=",
        )


def _row(step: int, report: EvaluationReport) -> Row:
    estimate = report.video_estimate
    return Row(step, estimate.value, estimate.low, estimate.high, report.clip_accuracy.value)


def read_rows(path: Path) -> list[Row]:
    """Read the measurements of a run; none where there is no file.

    Raises:
        FolderError: if it was changed since.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return [
                Row(int(line["step"]), *(float(line[name]) for name in _COLUMNS[1:]))
                for line in csv.DictReader(stream)
            ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise FolderError(
            f"{path} does not hold the measurements of a run any more ({quoted(str(error))})",
            hint="put it back, or remove it: those that were made are then forgotten, and training goes on",
        ) from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all measurements.

    Raises:
        OSError: if the file cannot be written; the older one stays.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(_COLUMNS)
        table.writerows([getattr(row, name) for name in _COLUMNS] for row in rows)
