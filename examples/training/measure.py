"""One backbone under every protocol: retrieval, linear probe, order-only pairs, ranking, fine-tuning."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from examples.training.methods import METHODS, DataSet, Unit, few_config, finetune_config, pretrain_config
from ivdr_deploy._files import atomic_path
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, read_checkpoint_info
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import FolderError
from ivdr_deploy.evaluation.metrics import retrieval_recall
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import ClipSpec, ViewPlan
from train.cache import CachedVideos, cache_videos
from train.config import FinetuneConfig, PretrainConfig, RunConfig
from train.config_file import changed_settings
from train.finetune import finetune
from train.losses import calibrate, ranking_accuracy, shuffle_segments
from train.pretrain import pretrain
from train.regression import fit
from train.run import CHECKPOINT_NAME

RESULTS = "results.json"
"""What was found, in the folder of a method and seed."""

FEATURES, FINE_TUNE, FEW = "features", "fine-tune", "few labels"
"""What is measured of a backbone; the first is several protocols that need its frozen features alone."""

PLAN = ViewPlan(num_clips=10)
_PENALTY = 0.01
_CALL = 16


def measure(unit: Unit) -> None:
    """Train one backbone, measure what was not measured of it yet, and keep each part as soon as it is found.

    Raises:
        FolderError: if a part that was finished before had other settings.
    """
    config = pretrain_config(unit)
    kept = _kept(unit)
    model, checkpoint = _trained(unit, config)
    start = [f"init={checkpoint}"] if checkpoint else []
    for part, settings in parts_of(unit).items():
        if part in kept:
            continue
        if part == FEATURES:
            ranks = METHODS[unit.method].kind == "pretrain" and config.dual.ranks
            values = features_and_order(model, unit.data, config, ranks=ranks)
        else:
            values = {part: _accuracy(_tuned(unit, part, start, supervised=checkpoint))}
        kept[part] = {"made_with": settings, "values": values}
        with atomic_path(unit.folder / RESULTS) as temporary:
            temporary.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for part in ("pretrain", "supervised", "finetune", "few"):
        shutil.rmtree(unit.folder / part, ignore_errors=True)  # some MB each


def measured(unit: Unit) -> dict[str, float] | None:
    """Return what ``measure`` found before, by protocol a share from 0 to 1; None where a part is missing.

    Raises:
        FolderError: if a part had other settings.
    """
    kept = _kept(unit)
    if any(part not in kept for part in parts_of(unit)):
        return None
    return {name: value for part in parts_of(unit) for name, value in kept[part]["values"].items()}


def parts_of(unit: Unit) -> dict[str, list[str]]:
    """Return what is measured of a backbone, each part with the settings that it is kept with."""
    start = [str(unit.data.test), *changed_settings(pretrain_config(unit))]
    parts = {FEATURES: start, FINE_TUNE: [*start, *changed_settings(finetune_config(unit))]}
    # What was trained with supervision has seen all labels.
    if unit.data.few is not None and METHODS[unit.method].kind != "supervised":
        parts[FEW] = [*start, *changed_settings(few_config(unit))]
    return parts


def _kept(unit: Unit) -> dict[str, Any]:
    path = unit.folder / RESULTS
    if not path.is_file():
        return {}
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part, settings in parts_of(unit).items():
        if part in kept and kept[part]["made_with"] != settings:
            raise FolderError(
                f"{path}: {part} was made with other settings", hint="give another --work, or remove it"
            )
    return kept


def _tuned(unit: Unit, part: str, start: list[str], *, supervised: Path | None) -> Path:
    if METHODS[unit.method].kind == "supervised":
        assert supervised is not None
        return supervised
    return trained_as((few_config if part == FEW else finetune_config)(unit, overrides=start))


def _accuracy(path: Path) -> float:
    return read_checkpoint_info(path).provenance.metrics["video_accuracy"]


def _trained(unit: Unit, config: PretrainConfig) -> tuple[VideoModel, Path | None]:
    kind = METHODS[unit.method].kind
    if kind == "random":
        torch.manual_seed(unit.seed)
        return build_model(config.model, config.clip).eval(), None
    if kind == "supervised":
        longer = [f"optim.epochs={config.optim.epochs}"]
        path = trained_as(finetune_config(unit, "supervised", overrides=longer))
    else:
        path = trained_as(config)
    return load_checkpoint(path).model, path


def trained_as(config: RunConfig) -> Path:
    """Train, or take the checkpoint of a run with the same settings that has ended."""
    path = Path(config.out) / CHECKPOINT_NAME
    if path.is_file():
        if read_checkpoint_info(path).provenance.config != to_dict(config):
            raise FolderError(
                f"{path} was made with other settings", hint="give another --work, or remove it"
            )
        return path
    return finetune(config) if isinstance(config, FinetuneConfig) else pretrain(cast(PretrainConfig, config))


def features_and_order(
    model: VideoModel, data: DataSet, config: PretrainConfig, *, ranks: bool
) -> dict[str, float]:
    """Measure what a frozen backbone can tell, and its series head where the method trained that to rank."""
    lists = [read_video_list(path) for path in (data.train, data.test)]
    labels = lists[0].labels
    with ExitStack() as opened:
        cached = [opened.enter_context(cache_videos(one, config.clip, config.cache_dir)) for one in lists]
        gallery, queries = (_features(model, videos, config.clip) for videos in cached)
        ranking = _ranking(model, cached[1], config.clip) if ranks else {}
    truth = [
        VideoList(one.source, part.items).targets(labels) for one, part in zip(lists, cached, strict=True)
    ]
    recall = retrieval_recall(
        np.stack([feature.mean(axis=0) for feature in gallery]),
        np.stack([feature.mean(axis=0) for feature in queries]),
        gallery_labels=truth[0],
        query_labels=truth[1],
        ks=(1,),
    )
    linear = fit(gallery, truth[0], num_classes=len(labels), penalty=_PENALTY)
    logits = np.stack([linear.logits(feature).mean(axis=0) for feature in queries])
    wanted = np.array(truth[1])
    found = {"R@1": recall[1].value, "probe": float((logits.argmax(axis=1) == wanted).mean())}
    if data.pairs:
        found |= _pairs(logits, wanted, labels, data.pairs)
    return found | ranking


def _pairs(
    logits: np.ndarray, truth: np.ndarray, labels: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Return the share of videos told from the other class of their order-only pair: by pair, and of all."""
    right = {}
    for pair in pairs:
        one, two = map(labels.index, pair)
        right[" or ".join(pair)] = np.concatenate(
            [
                logits[truth == mine, mine] > logits[truth == mine, other]
                for mine, other in ((one, two), (two, one))
            ]
        )
    return {"order pairs": float(np.concatenate(list(right.values())).mean())} | {
        name: float(one.mean()) for name, one in right.items()
    }


@torch.inference_mode()
def _features(model: VideoModel, videos: CachedVideos, clip: ClipSpec) -> list[np.ndarray]:
    return [
        model.encode(torch.from_numpy(videos.eval_clips(row, clip, PLAN))).numpy()
        for row in range(len(videos))
    ]


@torch.inference_mode()
def _ranking(model: VideoModel, videos: CachedVideos, clip: ClipSpec) -> dict[str, float]:
    """Return the ranking accuracy of unseen videos, over all orders and over those that are truly shuffled."""
    assert model.series_head is not None
    slots = model.series_head.num_slots
    orders = list(itertools.permutations(range(slots)))
    right = np.zeros((len(orders), len(videos)))
    for start in range(0, len(videos), _CALL):
        rows = range(start, min(start + _CALL, len(videos)))
        clips = np.concatenate([videos.eval_clips(row, clip, ViewPlan(num_clips=1)) for row in rows])
        video = torch.from_numpy(clips)
        q = model.series_head(model.encode(video))
        for number, order in enumerate(orders):
            permutation = torch.tensor([order]).expand(len(video), -1)
            given = model.series_head(model.encode(shuffle_segments(video, permutation)))
            right[number, rows.start : rows.stop] = ranking_accuracy(q, calibrate(given, permutation)).numpy()
    return {"ranking": float(right.mean()), "ranking, shuffled": float(right[1:].mean())}
