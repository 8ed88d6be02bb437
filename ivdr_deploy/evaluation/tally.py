"""One variant while ``verify`` runs: what it gives, video by video, beside what the reference gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.artifacts.golden import Golden
from ivdr_deploy.artifacts.manifest import ArtifactManifest, OutputParity, Variant
from ivdr_deploy.datasets.lists import VideoItem
from ivdr_deploy.errors import InferenceError
from ivdr_deploy.evaluation.invariance import (
    PROBE_CLIPS,
    BatchInvariance,
    Company,
    Probe,
    Sensitivity,
    choose_probes,
    fold,
    measure_batches,
    measure_sensitivity,
)
from ivdr_deploy.evaluation.metrics import leave_one_out_hits
from ivdr_deploy.evaluation.records import VariantRecord, VideoColumns
from ivdr_deploy.results import softmax
from ivdr_deploy.runtimes.base import Runtime, not_finite
from ivdr_deploy.runtimes.compare import TOLERANCE, compare_outputs
from ivdr_deploy.runtimes.proof import replay_golden
from ivdr_deploy.spec import MAX_BATCH


class NotOpened(Runtime):
    """Stands in the place of a variant that raised when it was opened, so that it fails as one that raises later.

    Args:
        variant: Which one.
        error: What it raised.
    """

    def __init__(self, variant: Variant, error: Exception) -> None:
        self.name, self.precision, self.output_names = variant.runtime, variant.precision, ()
        self.description, self.call_clips = "it could not be opened", MAX_BATCH
        self.failure = f"when it was opened ({_what(error)})"

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Raise an InferenceError: nothing can be run."""
        raise InferenceError(f"it failed {self.failure}")

    def close(self) -> None:
        """Nothing: nothing was opened."""


class Tally:
    """What one variant gave. Memory grows by one probability per class and one feature per video.

    Args:
        variant: Which one.
        runtime: What executes it.
        golden: Golden clips and what is expected of them; they are run at once.
    """

    def __init__(self, variant: Variant, runtime: Runtime, golden: Golden) -> None:
        self.variant, self.runtime, self._golden = variant, runtime, golden
        self.items: list[VideoItem] = []
        self.failure = runtime.failure if isinstance(runtime, NotOpened) else ""
        """What it raised first, and on what; empty while it runs through."""

        self._replayed: tuple[OutputParity, ...] = ()
        self._probabilities: list[np.ndarray] = []
        self._features: list[np.ndarray] = []
        self._parity: dict[str, OutputParity] = {}
        self._not_finite = 0
        self._batch: BatchInvariance | None = None
        self._sensitivity: tuple[Sensitivity, ...] = ()
        with self.blamed("on the golden clips"):
            self._replayed = replay_golden(golden, runtime)

    @contextmanager
    def blamed(self, doing: str) -> Iterator[None]:
        """Run the variant: what it raises in the block is its own failure, and ends no other's verdict."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a runtime raises what it likes
            self.failure = self.failure or f"{doing} ({_what(error)})"

    def add(
        self, item: VideoItem, outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
    ) -> None:
        """Take the outputs of one video's clips, and the reference's for the same clips."""
        self.items.append(item)
        self._not_finite += bool(not_finite(outputs))
        if "logits" in outputs:
            self._probabilities.append(softmax(_finite(outputs["logits"])).mean(axis=0))
        if "feature" in outputs:
            self._features.append(_finite(outputs["feature"]).mean(axis=0))
        if outputs is not reference:
            compared = compare_outputs(reference, outputs, precision=self.runtime.precision)
            self._parity = fold(self._parity, compared)

    def probe(self, seen: Sequence[Probe], *, place: int, batches: bool) -> None:
        """Run a few clips alone, in batches, and changed: clips of videos where there are some, golden ones else.

        Args:
            seen: Clips of the videos.
            place: Of this variant among those that they were run on.
            batches: Whether to make batches of them, or only compare with the calls over the videos.
        """
        if probes := choose_probes(self._golden, seen):
            with self.blamed("on clips alone, in batches or in reverse"):
                batch, alone = measure_batches(self.runtime, probes, place=place, batches=batches)
                if batch.sizes or batch.calls:
                    self._batch = batch
                self._sensitivity = measure_sensitivity(self.runtime, probes, alone)

    def record(self, reference: Tally, manifest: ArtifactManifest, facts: Mapping[str, Any]) -> VariantRecord:
        """Sum up, beside the reference; ``facts`` are the fields that all records of a run share."""
        return VariantRecord(
            variant=self.variant.id,
            variant_sha256=manifest.variant_sha256(self.variant),
            precision=self.runtime.precision,
            runtime=self.runtime.description,
            tolerance=TOLERANCE[self.runtime.precision],
            golden=self._replayed,
            outputs=tuple(self._parity.values()),
            failure=self.failure,
            not_finite=self._not_finite,
            batch=self._batch,
            sensitivity=self._sensitivity,
            videos=self._columns(reference, manifest.labels),
            **facts,
        )

    def _columns(self, reference: Tally, labels: Sequence[str]) -> VideoColumns:
        truth = tuple(item.label for item in self.items if item.label is not None)
        if len(truth) != len(self.items):
            truth = ()
        columns = VideoColumns(uris=tuple(item.uri for item in self.items), truth=truth)
        values: dict[str, Any] = {}
        if self._probabilities:
            rows = np.arange(len(self.items))
            expected, found = np.stack(reference._probabilities), np.stack(self._probabilities)
            old, new = expected.argmax(axis=1), found.argmax(axis=1)
            values = {
                "expected": tuple(labels[index] for index in old),
                "found": tuple(labels[index] for index in new),
                "margins": _rounded(expected[rows, old] - expected[rows, new]),
                "expected_confidence": _rounded(expected[rows, old]),
                "confidence": _rounded(found[rows, new]),
            }
        if len(self._features) > 1 and len(set(truth)) > 1:  # of one class, any neighbour would be right
            values |= {"expected_hits": reference._hits(truth), "hits": self._hits(truth)}
        return VideoColumns(uris=columns.uris, truth=truth, **values)

    def _hits(self, truth: Sequence[str]) -> tuple[bool, ...]:
        classes = {label: index for index, label in enumerate(sorted(set(truth)))}
        hits = leave_one_out_hits(np.stack(self._features), [classes[label] for label in truth])
        return tuple(hits.tolist())


class SideBySide(Runtime):
    """Feeds every batch to several variants, so that a video is decoded once; outputs are named ``place/name``.

    The first is what the others are held against. Where another one raises, NaN stands for its outputs: the variant
    failed on these videos, and the videos are no worse for it.
    """

    def __init__(self, tallies: Sequence[Tally]) -> None:
        runtimes = [tally.runtime for tally in tallies]
        first = runtimes[0]
        self.name, self.precision, self.output_names = first.name, first.precision, first.output_names
        self.call_clips = min(runtime.call_clips for runtime in runtimes)
        self.description = " beside ".join(runtime.description for runtime in runtimes)
        self.seen: list[Probe] = []
        """A few of the clips that came by, of different videos where a call held several."""

        self._tallies = tuple(tallies)

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch on all of them; see ``Runtime.infer``.

        Raises:
            InferenceError: if the first one raises: there is nothing to compare with, and no other one is run.
        """
        first, *others = self._tallies
        try:
            expected = first.runtime.infer(video)
        except Exception as error:
            raise InferenceError(
                f"the reference {first.variant.id} fails ({_what(error)}), so no variant can be compared on it",
                hint="take this video out of the list, or verify where the reference can run it",
            ) from error
        given = [expected]
        for tally in others:
            given.append({name: np.full_like(value, np.nan) for name, value in expected.items()})
            with tally.blamed(f"on {len(video)} clips of videos"):
                given[-1] = _shaped(tally.runtime.infer(video), expected)
        for place in {0, len(video) - 1}:
            if len(self.seen) < PROBE_CLIPS:
                found = tuple({name: value[place] for name, value in one.items()} for one in given)
                company = Company(size=len(video), place=place)
                self.seen.append(
                    Probe(clip=video[place].copy(), expected=found[0], company=company, found=found)
                )
        return {f"{place}/{name}": value for place, one in enumerate(given) for name, value in one.items()}

    @staticmethod
    def apart(outputs: Mapping[str, np.ndarray], runtimes: int) -> list[dict[str, np.ndarray]]:
        """Take joint outputs apart, one mapping per runtime."""
        parts: list[dict[str, np.ndarray]] = [{} for _ in range(runtimes)]
        for key, value in outputs.items():
            place, name = key.split("/", 1)
            parts[int(place)][name] = value
        return parts

    def close(self) -> None:
        """Nothing: whoever opened the runtimes closes them."""


def _shaped(found: dict[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes, wanted = ({name: value.shape for name, value in one.items()} for one in (found, expected))
    if shapes != wanted:
        raise InferenceError(f"it gives {quoted(shapes)}, expected {quoted(wanted)}")
    return found


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"


def _finite(values: np.ndarray) -> np.ndarray:
    """Put zeros in the place of NaN and infinity, so that the rest can be counted; they are counted apart."""
    finite: np.ndarray = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return finite


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """Return probabilities with the digits that fp32 has."""
    return tuple(np.round(values.astype(np.float64), 8).tolist())
