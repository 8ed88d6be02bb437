"""What is watched while a run trains: alarms with names, and a measure of the features after each epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ivdr_deploy._console import print_text
from ivdr_deploy._files import atomic_path
from ivdr_deploy.errors import TrainingError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.spec import ClipSpec, ViewPlan
from train.cache import CachedVideos
from train.distributed import gather_rows, rank, shard

if TYPE_CHECKING:
    from train.state import TrainState

ALARMS_NAME = "alarms.json"

FIRST_STEPS = 100
"""Nothing is said about order and spread before that many steps, nor before a quarter of the run: a flat start is
normal."""

NEIGHBOURS = 5
SAMPLE = 256
"""Most videos whose features are measured after an epoch."""

_CALL = 16
_MEMORY = 0.98
"""Share that a moving average keeps in a step."""


class Watch:
    """Looks at each line of the log, and raises the alarm once for each trouble.

    Args:
        state: Of the run; holds the moving averages and the alarms so far.
        folder: The run folder; the alarms stand in ``alarms.json``.
        total_steps: Steps of the run.
        stops: Whether an alarm ends the run.
        warmup: First steps, in which some of the losses have no part.
    """

    def __init__(
        self, state: TrainState, folder: Path, *, total_steps: int, stops: bool, warmup: int = 0
    ) -> None:
        self._state = state
        self._path = folder / ALARMS_NAME
        self._patience = max(FIRST_STEPS, total_steps // 4)
        self._warmup = warmup
        self._stops = stops
        self._seen = state.step
        self._write(state.alarms)

    def look(self) -> TrainingError | None:
        """Judge the latest line. Returns what is to end the run, if anything."""
        state = self._state
        steps, self._seen = state.step - self._seen, state.step
        kept = _MEMORY**steps
        for name, value in state.metrics.items():
            if np.isfinite(value):
                before = state.averages.get(name, value)
                state.averages[name] = kept * before + (1.0 - kept) * value
        if state.step - steps >= self._warmup:  # the loss grows when the others join: no divergence
            state.averages.setdefault("first_loss", state.metrics["loss"])
        known = {alarm["name"] for alarm in state.alarms}
        found = [alarm for alarm in self._troubles() if alarm["name"] not in known]
        if not found:
            return None
        for alarm in found:
            print_text(
                f"ALARM {alarm['name']} at step {state.step}: {alarm['message']}; {alarm['hint']}",
                style="yellow",
            )
        self._write([*state.alarms, *found])
        if not self._stops:
            state.alarms += found
            return None
        # Not among those of the state: the same command stops again until the trouble is over.
        return TrainingError(
            f"{found[0]['name']} at step {state.step}: {found[0]['message']}", hint=found[0]["hint"]
        )

    def _troubles(self) -> list[dict[str, str]]:
        state, average = self._state, self._state.averages
        troubles = []
        first = average.get("first_loss", state.metrics["loss"])
        if state.metrics["loss"] > 4.0 * abs(first) + 1.0:
            message = f"the loss is {state.metrics['loss']:.3g} and was {first:.3g} at the start"
            troubles.append(("divergence", message, "lower optim.lr, or set optim.warmup_epochs"))
        if state.step >= self._patience:
            if average.get("uniformity", -1.0) > -0.05:
                message = (
                    f"the embeddings of all videos fall together (uniformity {average['uniformity']:.3f})"
                )
                troubles.append(("collapse", message, "lower optim.lr, or raise optim.batch_size"))
            if average.get("order_score", 1.0) < 0.3:
                troubles.append(("order plateau", *_why_order_is_not_learned(average)))
        return [
            {"step": str(state.step), "name": name, "message": message, "hint": hint}
            for name, message, hint in troubles
        ]

    def _write(self, alarms: Sequence[Mapping[str, str]]) -> None:
        if rank() == 0 and (alarms or self._path.exists()):
            with atomic_path(self._path) as temporary:
                temporary.write_text(json.dumps(list(alarms), indent=2) + "\n", encoding="utf-8")


def _why_order_is_not_learned(average: Mapping[str, float]) -> tuple[str, str]:
    """Tell the ways apart in which shuffle-rank stays at chance; return message and hint."""
    cosine, clamped = average["slot_cosine"], average["clamped_share"]
    seen = (
        f"order score {average['order_score']:.2f}, {average['swapped_accuracy_same']:.0%} right of truly shuffled "
        f"clips, slot cosine {cosine:.2f}"
    )
    if clamped > 0.2 and cosine < 0.5:
        return f"{seen}; {clamped:.0%} of the comparisons are beyond the clamp", "set dual.rank_clamp=0"
    if cosine > 0.95:
        return f"{seen}; the slots of a clip fall together", "set model.head_norm=series"
    return seen, "raise dual.rank_weight; with four slots or more set dual.rank_warmup_steps"


def knn_accuracy(
    queries: Tensor, truth: Tensor, gallery: Tensor, labels: Tensor, *, leave_one_out: bool = False
) -> float:
    """Return the share of queries whose class their nearest neighbours name, weighed by similarity.

    Args:
        queries: (Q, F) features.
        truth: int64 (Q,) classes.
        gallery: (G, F) features.
        labels: int64 (G,) classes.
        leave_one_out: Whether the queries are the gallery, and none is its own neighbour.
    """
    centre = gallery.mean(dim=0)
    one, two = (torch.nn.functional.normalize(part - centre, dim=-1) for part in (queries, gallery))
    similarities = one @ two.mT
    if leave_one_out:
        similarities.fill_diagonal_(-torch.inf)
    near = similarities.topk(min(NEIGHBOURS, len(gallery) - leave_one_out), dim=1)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=near.values.dtype)
    votes.scatter_add_(1, labels[near.indices], near.values + 1.0)
    return float((votes.argmax(dim=1) == truth).double().mean())


class FeatureCheck:
    """kNN accuracy of the features of labelled videos, each against the others.

    Args:
        model: Put into eval mode for the time of a call.
        cached: The videos; those without a label are left out.
        clip: The contract; the middle clip of a video is taken.
    """

    def __init__(self, model: VideoModel, cached: CachedVideos, clip: ClipSpec) -> None:
        self._model, self._cached, self._clip = model, cached, clip
        labelled = [row for row, item in enumerate(cached.items) if item.label is not None]
        chosen = np.unique(np.linspace(0, len(labelled) - 1, min(SAMPLE, len(labelled))).astype(int))
        self._rows = [labelled[place] for place in chosen]
        names = [str(cached.items[row].label) for row in self._rows]
        self._labels = torch.tensor([sorted(set(names)).index(name) for name in names])

    def __bool__(self) -> bool:
        """Whether there is anything to measure: two classes at least."""
        return len(set(self._labels.tolist())) > 1

    def __call__(self) -> dict[str, float]:
        """Return ``knn_accuracy``; a share of the videos is encoded by each process."""
        own = [self._rows[place] for place in shard(len(self._rows))]
        training, device = self._model.training, next(self._model.parameters()).device
        self._model.eval()
        with torch.inference_mode():
            parts = [self._encode(own[start : start + _CALL], device) for start in range(0, len(own), _CALL)]
        self._model.train(training)
        none = torch.empty(0, self._model.feature_dim)  # of a process that has no share
        features = gather_rows(torch.cat([none, *parts]), count=len(self._rows))
        accuracy = knn_accuracy(features, self._labels, features, self._labels, leave_one_out=True)
        return {"knn_accuracy": accuracy}

    def _encode(self, rows: Sequence[int], device: torch.device) -> Tensor:
        clips = [self._cached.eval_clips(row, self._clip, ViewPlan(num_clips=1)) for row in rows]
        return self._model.encode(torch.from_numpy(np.concatenate(clips)).to(device)).cpu()
