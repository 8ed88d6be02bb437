"""Two ways to train on one list, tried on groups of it that are held out; the better one is taken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ivdr_deploy._console import print_text
from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.errors import DataError
from ivdr_deploy.evaluation.metrics import Accuracy
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import canonical_json
from train.config import FinetuneConfig
from train.init import load_finetune_config
from train.probe import Probe, open_probe
from train.run import CHECKPOINT_NAME, run_folder, start_run

TrainOn = Callable[[FinetuneConfig, VideoList, VideoList, tuple[str, ...]], Path]
"""Trains on the first list and measures on the second: settings, lists and labels -> the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The better one of two ways to train."""

    config: FinetuneConfig
    probe: Probe | None
    """What was computed already, where it is a linear probe."""

    metrics: dict[str, float]
    """Both accuracies on held-out videos."""


def choose(
    config: FinetuneConfig,
    videos: VideoList,
    labels: tuple[str, ...],
    parts: Sequence[np.ndarray],
    *,
    train_on: TrainOn,
) -> Chosen:
    """Try ``config`` and the settings of ``config.against`` on held-out parts; of equals, ``config`` is taken.

    Args:
        config: The settings.
        videos: The training list.
        labels: Classes, in logit order.
        parts: Rows of the list that are held out in turn.
        train_on: Trains what is no linear probe.

    Raises:
        DataError: if nothing can be held out.
        ConfigError: if the other settings are not usable.
    """
    if not parts:
        raise DataError(
            f"{videos.source}: no video can be held out: every class is of one group",
            hint="set against= to nothing, or give the list a column group with several groups of some class",
        )
    given = [f"out={config.out}", f"data.train={config.data.train}"]
    other = load_finetune_config(config.against, given)
    other = replace(other, data=config.data, seed=config.seed, device=config.device, against="")
    config = replace(config, against="")
    tried: list[tuple[FinetuneConfig, Probe | None, Accuracy]] = []
    for way in (config, other):
        probe = open_probe(way, videos, labels, parts) if way.linear_probe else None
        accuracy = probe.held_out if probe else _by_training(way, videos, labels, parts, train_on)
        tried.append((way, probe, accuracy))
    (_, _, first), (_, _, second) = tried
    taken = int(second.value > first.value)
    for place, (way, _, accuracy) in enumerate(tried):
        mark = "taken" if place == taken else "not taken"
        print_text(f"{mark}: {describe(way)}: {accuracy} of held-out videos")
    way, probe, accuracy = tried[taken]
    metrics = {
        "held_out_accuracy": accuracy.value,
        "held_out_videos": accuracy.total,
        "held_out_accuracy_of_other": tried[1 - taken][2].value,
    }
    return Chosen(config=way, probe=probe, metrics=metrics)


def describe(config: FinetuneConfig) -> str:
    """Name a way to train, for people."""
    kind = "linear probe" if config.linear_probe else f"{config.model.backbone}, {config.optim.epochs} epochs"
    return f"{kind}, from {config.init or 'random weights'}"


def _by_training(
    config: FinetuneConfig,
    videos: VideoList,
    labels: tuple[str, ...],
    parts: Sequence[np.ndarray],
    train_on: TrainOn,
) -> Accuracy:
    """Train once for each part, on all but that part; what was trained before under the same settings is kept."""
    right = total = 0
    for number, part in enumerate(parts):
        held = set(part.tolist())
        rest, shown = (
            replace(
                videos, items=tuple(item for row, item in enumerate(videos.items) if (row in held) == inside)
            )
            for inside in (False, True)
        )
        settings = {name: value for name, value in to_dict(config).items() if name not in ("out", "data")}
        settings["cache_form"] = config.data.cache_form
        identity = canonical_json([settings, rest.data_hash, shown.data_hash])
        digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        # With one cache for all parts each video is decoded once.
        data = replace(config.data, cache=str(config.cache_dir))
        part_config = replace(config, out=str(config.cache_dir / f"held-out-{digest}"), data=data)
        path = Path(part_config.out) / CHECKPOINT_NAME
        if not path.exists():
            print_text(f"held-out part {number + 1} of {len(parts)}: {describe(config)}")
            start_run(part_config)
            with run_folder(part_config):
                train_on(part_config, rest, shown, labels)
        metrics = read_checkpoint_info(path).provenance.metrics
        right += round(metrics["video_accuracy"] * metrics["test_videos"])
        total += int(metrics["test_videos"])
    return Accuracy(right, total)
