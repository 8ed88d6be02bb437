"""Does every model of a bundle compute what the trained network computes? On golden clips, and on videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.datasets.lists import VideoItem, VideoList, read_video_list
from ivdr_deploy.errors import DataError, EngineIncompatibleError, MissingDependencyError
from ivdr_deploy.evaluation.metrics import Accuracy, leave_one_out_recall
from ivdr_deploy.pipeline import Outcome, VideoPredictor, softmax
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.runtimes.compare import compare_outputs
from ivdr_deploy.runtimes.loading import bundle_model, open_runtime, replay_golden
from ivdr_deploy.spec import Device, OutputParity, Precision, RuntimeName

TIE_MARGIN = 1e-4
"""Two labels that torch itself finds as probable as this are a tie: rounding decides between them."""

Track = Callable[[Iterable[Outcome], int], Iterable[Outcome]]
"""Wraps the outcomes of a run, given how many there will be; a progress bar, for example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A video to which a model gives another label than torch does."""

    uri: str
    expected: str
    """Torch's label."""

    found: str
    margin: float
    """How much more probable torch finds its own label than the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadVideo:
    """A listed video that no model saw."""

    uri: str
    code: str
    message: str
    hint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """What was found about one model file."""

    runtime: RuntimeName
    precision: Precision
    description: str = ""
    skipped: str = ""
    """Why it could not run here; empty when it ran."""

    golden: tuple[OutputParity, ...] = ()
    """Against the recorded outputs."""

    parity: tuple[OutputParity, ...] = ()
    """Against torch, over every clip of the listed videos; empty for torch itself."""

    agreement: Accuracy | None = None
    """Videos with the same label as from torch."""

    flips: tuple[Flip, ...] = ()
    accuracy: Accuracy | None = None
    """Video accuracy, when the list has labels."""

    retrieval: Accuracy | None = None
    """R@1 among the listed videos with ``feature``, when the list has labels."""

    @property
    def passed(self) -> bool:
        """Whether every difference is within tolerance and every flip is a tie; true for a skipped model."""
        agrees = all(entry.passed for entry in (*self.golden, *self.parity))
        return agrees and all(flip.margin <= TIE_MARGIN for flip in self.flips)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """The verdict on one bundle."""

    bundle: str
    name: str
    version: str
    contract_hash: str
    data: str | None
    videos: int
    """Videos that every model saw."""

    bad_videos: tuple[BadVideo, ...]
    models: tuple[ModelReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every model that could run passed."""
        return all(model.passed for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it, with ``passed`` added for the whole and for each model."""
        models = []
        for model in self.models:
            values = to_dict(model)
            for name in ("agreement", "accuracy", "retrieval"):
                measured: Accuracy | None = getattr(model, name)
                values[name] = measured.to_dict() if measured is not None else None
            for entry in (*values["golden"], *values["parity"]):
                # An absent or broken output differs infinitely, which JSON cannot say.
                entry["max_abs_diff"] = (
                    entry["max_abs_diff"] if math.isfinite(entry["max_abs_diff"]) else None
                )
            models.append({**values, "passed": model.passed})
        return {**to_dict(self), "models": models, "passed": self.passed}


def verify_bundle(
    path: str | Path, *, data: str | Path | None = None, track: Track = lambda outcomes, total: outcomes
) -> VerifyReport:
    """Check a bundle.

    Args:
        path: The bundle.
        data: A list of videos, best with labels; None replays the golden clips only. Each video is decoded
            once and goes through all models.
        track: Wraps the run over the videos.

    Raises:
        ArtifactError: if the bundle is damaged.
        EngineIncompatibleError: if no model of it can run here.
        DataError: if the list is not usable, a label in it is unknown to the model, or none of its videos can
            be used.
    """
    bundle = open_bundle(path)
    videos = read_video_list(data) if data is not None else None
    if videos is not None and videos.labels and bundle.manifest.labels:
        videos.targets(bundle.manifest.labels)  # refuses unknown labels before anything is decoded
    with ExitStack() as stack:
        opened, skipped = _open_models(bundle, stack)
        bad_videos: tuple[BadVideo, ...] = ()
        tallies = [_Tally(runtime=runtime, golden=replay_golden(bundle, runtime)) for runtime in opened]
        if videos is not None:
            bad_videos = _run_videos(bundle, videos, tallies, track)
        labels = bundle.manifest.labels
        models = [
            tally.report(tallies[0], labels, is_reference=index == 0) for index, tally in enumerate(tallies)
        ]
    return VerifyReport(
        bundle=str(path),
        name=bundle.manifest.name,
        version=bundle.manifest.version,
        contract_hash=bundle.manifest.contract_hash,
        data=None if data is None else str(data),
        videos=len(tallies[0].items),
        bad_videos=bad_videos,
        models=(*models, *skipped),
    )


def _open_models(bundle: Bundle, stack: ExitStack) -> tuple[list[Runtime], list[ModelReport]]:
    """Open every model that can run here, torch first, and report those that cannot."""
    models = [entry for entry in bundle.manifest.files if entry.kind == "model"]
    models.sort(key=lambda entry: entry.runtime != "torch")
    opened, skipped = [], []
    for entry in models:
        runtime, precision = entry.runtime, entry.precision
        if runtime is None or precision is None:
            continue
        try:
            device: Device = "cuda" if runtime == "tensorrt" else "cpu"
            opened.append(stack.enter_context(open_runtime(bundle, runtime, precision, device=device)))
        except (EngineIncompatibleError, MissingDependencyError) as error:
            skipped.append(ModelReport(runtime=runtime, precision=precision, skipped=str(error)))
    if not opened:
        reasons = "; ".join(model.skipped for model in skipped)
        raise EngineIncompatibleError(f"no model of {bundle.path} can run here: {reasons or 'it holds none'}")
    return opened, skipped


@dataclass(kw_only=True)
class _Tally:
    """What one model gave, video by video."""

    runtime: Runtime
    golden: tuple[OutputParity, ...]
    items: list[VideoItem] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    parity: dict[str, list[OutputParity]] = field(default_factory=dict)

    def add(
        self, item: VideoItem, outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray] | None
    ) -> None:
        """Take the outputs of one video's clips, and torch's for the same clips unless this is torch."""
        self.items.append(item)
        if "logits" in outputs:
            self.probabilities.append(softmax(outputs["logits"]).mean(axis=0))
        if "feature" in outputs:
            self.features.append(outputs["feature"].mean(axis=0))
        if expected is not None:
            runtime, precision = self.runtime.name, self.runtime.precision
            for entry in compare_outputs(expected, outputs, runtime=runtime, precision=precision):
                self.parity.setdefault(entry.output, []).append(entry)

    def report(self, reference: _Tally, labels: Sequence[str], *, is_reference: bool) -> ModelReport:
        top = [int(row.argmax()) for row in self.probabilities]
        expected = [int(row.argmax()) for row in reference.probabilities]
        flips = tuple(
            Flip(uri=item.uri, expected=labels[old], found=labels[new], margin=float(row[old] - row[new]))
            for item, row, old, new in zip(self.items, reference.probabilities, expected, top, strict=False)
            if old != new
        )
        labelled = bool(self.items) and all(item.label is not None for item in self.items)
        truth = [str(item.label) for item in self.items]
        correct = sum(labels[index] == label for index, label in zip(top, truth, strict=False))
        classes = {label: index for index, label in enumerate(sorted(set(truth)))}
        retrieval = None
        if labelled and len(self.features) > 1:
            retrieval = leave_one_out_recall(np.stack(self.features), [classes[label] for label in truth])
        return ModelReport(
            runtime=self.runtime.name,
            precision=self.runtime.precision,
            description=self.runtime.description,
            golden=self.golden,
            parity=tuple(_together(entries) for entries in self.parity.values()),
            agreement=None if is_reference or not top else Accuracy(len(top) - len(flips), len(top)),
            flips=flips,
            accuracy=Accuracy(correct, len(top)) if labelled and top else None,
            retrieval=retrieval,
        )


def _together(entries: Sequence[OutputParity]) -> OutputParity:
    """Join the comparisons of several videos into what comparing all their clips at once would give."""
    first = entries[0]
    return OutputParity(
        runtime=first.runtime,
        precision=first.precision,
        output=first.output,
        max_abs_diff=max(entry.max_abs_diff for entry in entries),
        min_cosine=min(entry.min_cosine for entry in entries),
        tolerance=max(entry.tolerance for entry in entries),
    )


class _SideBySide(Runtime):
    """Feeds every batch to several runtimes, so that a video is decoded once; answers as the first one."""

    def __init__(self, runtimes: Sequence[Runtime]) -> None:
        first = runtimes[0]
        self.name, self.precision, self.output_names = first.name, first.precision, first.output_names
        self.description = " beside ".join(runtime.description for runtime in runtimes)
        self._runtimes = tuple(runtimes)
        self._calls: list[list[dict[str, np.ndarray]]] = []

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        outputs = [runtime.infer(video) for runtime in self._runtimes]
        self._calls.append(outputs)
        return outputs[0]

    def close(self) -> None:
        """Nothing: whoever opened the runtimes closes them."""

    def take(self) -> list[dict[str, np.ndarray]]:
        """Return each runtime's outputs since the last call of this, joined along the clips."""
        calls, self._calls = self._calls, []
        return [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*calls, strict=True)
        ]


def _run_videos(
    bundle: Bundle, videos: VideoList, tallies: Sequence[_Tally], track: Track
) -> tuple[BadVideo, ...]:
    """Put every video through all models; return those that cannot be used."""
    runtimes = _SideBySide([tally.runtime for tally in tallies])
    predictor = VideoPredictor(bundle_model(bundle, runtimes, tallies[0].golden))
    outcomes = predictor.predict_many(item.path for item in videos.items)
    bad = []
    for item, outcome in zip(videos.items, track(outcomes, len(videos.items)), strict=True):
        if outcome.error is not None:
            bad.append(BadVideo(uri=item.uri, **outcome.error.to_dict()))
            continue
        outputs = runtimes.take()
        for index, (tally, found) in enumerate(zip(tallies, outputs, strict=True)):
            tally.add(item, found, outputs[0] if index else None)
    if len(bad) == len(videos.items):
        raise DataError(
            f"{videos.source}: none of its {len(bad)} videos can be used; the first: {bad[0].message}",
            hint="check the paths; `ivdr predict BUNDLE VIDEO` says more about one",
        )
    return tuple(bad)
