"""The log of a training run: ``metrics.csv``, TensorBoard and the console."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from ivdr_deploy._console import print_text
from ivdr_deploy._text import reason_of
from ivdr_deploy.errors import MissingDependencyError, TrainingError
from train.distributed import is_unknown, mean_of_all, rank

METRICS_NAME = "metrics.csv"
_SHOWN = re.compile(r"^loss|accuracy$|^lr$")
"""Metrics on the console; the others are for the files."""


class RunLog:
    """Means of the metrics over every few steps.

    Args:
        folder: The run folder.
        total_steps: Steps of the run.
        every: Steps that one line covers.
        position: Bytes of ``metrics.csv`` that are kept; 0 starts it anew.
    """

    def __init__(self, folder: Path, *, total_steps: int, every: int, position: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                f"training writes TensorBoard events, and tensorboard cannot be imported ({reason_of(error)})",
                hint="install what training needs with: pip install --group train",
            ) from error

        self._total = total_steps
        self._every = every
        self._writes = rank() == 0
        self._window: list[dict[str, Tensor | float]] = []
        self.last: dict[str, float] = {}
        """Means of the latest line, over all processes."""
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_NAME
        # A state is flushed to disk and the log is not: a machine that lost power may have lost the end of it.
        there = min(position, path.stat().st_size) if path.is_file() else 0
        if there < position:
            print_text(f"{path} has lost lines: {there} of {position} bytes are there", style="yellow")
        self._file = path.open("r+" if there else "w", newline="", encoding="utf-8")
        self._file.truncate(there)
        self._file.seek(there)
        self._has_header = there > 0
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self._board = SummaryWriter(str(folder / "tensorboard" / stamp))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self._file.close()
            self._board.close()

    @property
    def position(self) -> int:
        """Bytes of ``metrics.csv`` so far."""
        return os.fstat(self._file.fileno()).st_size if self._writes else 0

    def add(self, step: int, metrics: Mapping[str, Tensor | float], *, now: bool = False) -> bool:
        """Take the metrics of one step; tensors are read only when a line is due: the device need not wait.

        Args:
            step: Which one, from 0.
            metrics: Of the step.
            now: Whether a line is written in any case.

        Returns:
            Whether a line was written, so that none of the metrics so far is pending.

        Raises:
            TrainingError: if the loss is not finite.
        """
        self._window.append(
            {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        )
        # By the step and not by the window: a run that was asked to stop between two lines, and goes on, measures,
        # saves and ends where one that was left alone does.
        due = now or (step + 1) % self._every == 0 or step + 1 == self._total
        if due:
            self._write(step + 1)
        return due

    def _write(self, step: int) -> None:
        window, self._window = self._window, []
        means = {name: _mean([float(row[name]) for row in window], name) for name in window[0]}
        self.last = mean_of_all(means)
        if self._writes:
            self._write_line(step)
        if not math.isfinite(self.last["loss"]):
            raise TrainingError(
                f"divergence: the loss is {self.last['loss']} at step {step}",
                hint="lower optim.lr, or set optim.warmup_epochs; the last saved state is kept",
            )

    def _write_line(self, step: int) -> None:
        table = csv.writer(self._file)
        if not self._has_header:
            table.writerow(["step", *self.last])
            self._has_header = True
        table.writerow([step, *(f"{value:.6g}" for value in self.last.values())])
        self._file.flush()
        for name, value in self.last.items():
            self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.3g}" for name, value in self.last.items() if _SHOWN.search(name))
        print_text(f"step {step}/{self._total}  {shown}")


def _mean(values: Sequence[float], name: str) -> float:
    """Return the mean of a metric over the steps that could measure it."""
    known = [value for value in values if not is_unknown(name, value)]
    return sum(known) / len(known) if known else math.nan
