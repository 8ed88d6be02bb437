"""What a backbone is worth as it is: retrieval, nearest neighbours and a linear probe on features computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ivdr_deploy._console import print_text, say_left_out
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import CheckpointError, DataError, IvdrError
from ivdr_deploy.evaluation.bootstrap import Estimate, share_estimate
from ivdr_deploy.evaluation.metrics import retrieval_ranks
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.reader import VideoLimits
from train.answers import answer, units_of
from train.features import FrozenNetwork, video_outputs
from train.groups import held_out_parts
from train.regression import choose_penalty, fit
from train.report import EvaluationReport, report_on

Protocol = Literal["retrieval", "knn", "linear-probe"]
RECALL_AT = (1, 5, 10, 20, 50)
"""Places up to which retrieval counts; the published ones."""

NEIGHBOURS = 20
"""Videos that vote in ``knn``."""

_TEMPERATURE = 0.07
"""Of the votes: each counts exp(cosine / this)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """Features of a gallery and of queries, each the mean over a video's clips."""

    model: LoadedModel
    """Closed by now."""

    plan: ViewPlan
    gallery: VideoList
    queries: VideoList
    gallery_features: tuple[np.ndarray | IvdrError, ...]
    """(clips, F) of every video, or why there are none."""

    query_features: tuple[np.ndarray | IvdrError, ...]
    labels: tuple[str, ...]
    """Classes of the gallery."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What the listings passed over."""
        return (*self.gallery.left_out, *self.queries.left_out)

    def known(self) -> tuple[list[np.ndarray], list[int]]:
        """Return features (clips, F) and classes of the gallery's usable videos.

        Raises:
            DataError: if there are fewer than two.
        """
        targets = self.gallery.targets(self.labels)
        pairs = zip(self.gallery_features, targets, strict=True)
        good = [(one, target) for one, target in pairs if not isinstance(one, IvdrError)]
        if len(good) < 2:
            raise DataError(f"{self.gallery.source}: {len(good)} videos can be used, a gallery needs two")
        return [one for one, _ in good], [target for _, target in good]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalReport:
    """Share of queries with a gallery video of their class among the k nearest."""

    model: str
    gallery: str
    data: str
    view_plan: ViewPlan
    gallery_videos: int
    """Usable ones."""

    queries: int
    """All of them; one that cannot be used finds nothing."""

    recalls: dict[int, Estimate]
    """By k."""

    units: str
    """What the intervals are drawn over, and how that is known."""

    failed: tuple[tuple[str, str], ...]
    """Videos of either list that could not be used, with the reason."""

    left_out: tuple[LeftOut, ...]
    """What the listings passed over."""

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "protocol": "retrieval",
            "model": self.model,
            "gallery": self.gallery,
            "data": self.data,
            "view_plan": to_dict(self.view_plan),
            "gallery_videos": self.gallery_videos,
            "queries": self.queries,
            "recall_at": {str(k): estimate.to_dict() for k, estimate in self.recalls.items()},
            "intervals_over": self.units,
            "failed": [{"uri": uri, "reason": reason} for uri, reason in self.failed],
            "left_out": [asdict(entry) for entry in self.left_out],
        }


def open_frozen(
    model: LoadedModel,
    gallery: str | Path,
    queries: str | Path,
    cache: str | Path,
    *,
    root: str | Path | None = None,
    plan: ViewPlan | None = None,
    limits: VideoLimits | None = None,
    decode: DecodeOptions | None = None,
) -> Frozen:
    """Compute the features of both lists that are not kept yet; closes the model.

    Args:
        model: With the output ``feature``.
        gallery: Labelled; of a list that holds two parts, the training part.
        queries: Labelled; the test part.
        cache: Folder where features are kept.
        root: Where relative paths in the lists start.
        plan: Which clips; 10 when None, as in the paper.
        limits: What a video may cost.
        decode: The decode workers.

    Raises:
        DataError: if a list is unusable, or the queries have a class that the gallery does not.
        CheckpointError: if the model gives no features.
        OSError: if a feature cannot be kept.
    """
    with model.runtime:
        if "feature" not in model.output_names:
            raise CheckpointError(
                f"{model.path} gives no features", hint="export the bundle again with all outputs"
            )
        first = read_video_list(gallery, root=root, part="train")
        second = read_video_list(queries, root=root, part="test")
        for one in (first, second):
            say_left_out(one.left_out)
            one.require_labels()
        second.targets(first.labels)
        plan = plan or ViewPlan(num_clips=10)
        # Variants of other precisions share the file of weights; in fp32 the features are those of a linear probe.
        weights = model.sha256 if model.runtime.precision == "fp32" else f"{model.sha256} {model.variant}"
        backbone = FrozenNetwork(weights_sha256=weights, clip=model.clip, view_plan=plan, open=lambda: model)
        both = replace(first, items=(*first.items, *second.items))
        made = video_outputs(
            both, backbone, Path(cache), decode=decode or DecodeOptions(), limits=limits or VideoLimits()
        )
    split = len(first.items)
    return Frozen(
        model=model,
        plan=plan,
        gallery=first,
        queries=second,
        gallery_features=tuple(made[:split]),
        query_features=tuple(made[split:]),
        labels=first.labels,
    )


def retrieve(frozen: Frozen) -> RetrievalReport:
    """Compute R@k as the paper does: mean over clips, each set centred by its own mean, cosine."""
    known, classes = frozen.known()
    asked = frozen.queries.targets(frozen.labels)
    usable = [row for row, one in enumerate(frozen.query_features) if not isinstance(one, IvdrError)]
    places = np.full(len(asked), len(known))
    if usable:
        places[usable] = retrieval_ranks(
            _means(known),
            _means([one for one in frozen.query_features if not isinstance(one, IvdrError)]),
            gallery_labels=classes,
            query_labels=[asked[row] for row in usable],
        )
    units, said = units_of(frozen.queries.items)
    ones = [1] * len(asked)
    lists = ((frozen.gallery, frozen.gallery_features), (frozen.queries, frozen.query_features))
    return RetrievalReport(
        model=str(frozen.model.path),
        gallery=str(frozen.gallery.source),
        data=str(frozen.queries.source),
        view_plan=frozen.plan,
        gallery_videos=len(known),
        queries=len(asked),
        recalls={
            k: share_estimate((places < min(k, len(known))).astype(int).tolist(), ones, units)
            for k in RECALL_AT
        },
        units=said,
        failed=tuple(
            (item.uri, str(one))
            for videos, made in lists
            for item, one in zip(videos.items, made, strict=True)
            if isinstance(one, IvdrError)
        ),
        left_out=frozen.left_out,
    )


def classify(frozen: Frozen, protocol: Protocol) -> EvaluationReport:
    """Measure a classifier that the gallery alone gives: its nearest videos vote, or a linear probe.

    Args:
        frozen: The features.
        protocol: ``knn`` or ``linear-probe``.
    """
    known, classes = frozen.known()
    if protocol == "linear-probe":
        penalty, _ = choose_penalty(
            frozen.gallery_features,
            frozen.gallery.targets(frozen.labels),
            held_out_parts(frozen.gallery, seed=0),
            num_classes=len(frozen.labels),
        )
        linear = fit(known, classes, num_classes=len(frozen.labels), penalty=penalty)
        print_text(f"penalty {penalty:g}, chosen on held-out groups of the gallery", style="dim")
        classifier = linear.logits
    else:
        classifier = _voter(known, classes, num_classes=len(frozen.labels))
    given = [one if isinstance(one, IvdrError) else classifier(one) for one in frozen.query_features]
    units, said = units_of(frozen.queries.items)
    clips = frozen.plan.max_views if protocol == "linear-probe" else 1
    targets = frozen.queries.targets(frozen.labels)
    answers = [
        answer(*one, clips=clips) for one in zip(frozen.queries.items, units, targets, given, strict=True)
    ]
    return report_on(
        answers,
        frozen.labels,
        model=f"{protocol} on {frozen.model.path}",
        data=str(frozen.queries.source),
        contract_hash=frozen.model.contract_hash,
        plan=frozen.plan,
        units=said,
        left_out=frozen.left_out,
    )


def _voter(known: Sequence[np.ndarray], classes: Sequence[int], *, num_classes: int) -> Any:
    """Return what maps the features (clips, F) of a video to log shares of the votes (1, K)."""
    means = _means(known)
    centre = means.mean(axis=0)
    unit = _unit(means - centre)
    owners = np.asarray(classes)

    def vote(feature: np.ndarray) -> np.ndarray:
        cosine = unit @ _unit(feature.mean(axis=0, keepdims=True).astype(np.float64) - centre)[0]
        nearest = np.argsort(-cosine, kind="stable")[: min(NEIGHBOURS, len(cosine))]
        votes = np.zeros(num_classes)
        np.add.at(votes, owners[nearest], np.exp((cosine[nearest] - 1.0) / _TEMPERATURE))
        log: np.ndarray = np.log(np.maximum(votes / votes.sum(), 1e-12))[None]
        return log

    return vote


def _means(features: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([one.mean(axis=0) for one in features]).astype(np.float64)


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
