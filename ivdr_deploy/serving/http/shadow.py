"""Whether a new version of a model may take the place of the one that serves: what it shares, and how it answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.errors import ArtifactError, ContractMismatchError
from ivdr_deploy.serving.http.channel import Message

MIN_AGREEMENT = 0.9
"""Share of videos to which two versions must give the same label. One that was trained again changes its mind about a
few; one with other preprocessing, labels in another order or damaged weights about most."""

Answer = Callable[[Path], Message]
"""Answers for a video: ``status`` and ``body``, as a request would get them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """How one version answered for a video."""

    status: int
    label: str | None
    """The first prediction; None where there is none."""

    score: float
    code: str
    """Of the error; empty where there is none."""

    infer_ms: float

    def __str__(self) -> str:
        if self.code:
            return f"{self.status} {self.code}"
        return "an answer" if self.label is None else f"{self.label} {self.score:.2f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """How two versions answered for the same video."""

    video: Path
    old: Said
    new: Said


@dataclass(frozen=True, kw_only=True, slots=True)
class Shadow:
    """How two versions answered for the same videos, and whether the new one may serve."""

    pairs: tuple[Pair, ...]
    min_agreement: float

    @property
    def both(self) -> list[Pair]:
        """Those that both answered."""
        return [pair for pair in self.pairs if not pair.old.code and not pair.new.code]

    @property
    def flips(self) -> list[Pair]:
        """Those that both answered, with different labels."""
        return [pair for pair in self.both if pair.old.label != pair.new.label]

    @property
    def lost(self) -> list[Pair]:
        """Those that the old version answered and the new one did not."""
        return [pair for pair in self.pairs if pair.new.code and not pair.old.code]

    @property
    def agreement(self) -> float:
        """Share of the same label among those that both answered; 0 where there are none."""
        return 1.0 - len(self.flips) / len(self.both) if self.both else 0.0

    @property
    def passed(self) -> bool:
        """Whether the new version may take the place of the old one."""
        return not self.lost and bool(self.both) and self.agreement >= self.min_agreement

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it; a model without labels has no agreement to speak of."""
        both = self.both
        labelled = any(pair.old.label is not None for pair in both)
        return {
            "passed": self.passed,
            "videos": len(self.pairs),
            "answered_by_both": len(both),
            "agreement": self.agreement if labelled else None,
            "min_agreement": self.min_agreement,
            "mean_score_change": statistics.fmean(abs(p.new.score - p.old.score) for p in both)
            if both
            else None,
            "median_infer_ms": [_median([pair.old for pair in both]), _median([pair.new for pair in both])],
            "flips": [_row(pair) for pair in self.flips],
            "lost": [_row(pair) for pair in self.lost],
        }


def described(bundle: Path) -> Message:
    """Return of a bundle what ``check_replacement`` looks at, as ``InferenceService.describe`` says it.

    Raises:
        ArtifactError: if it is none, or damaged.
    """
    manifest = open_bundle(bundle).manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "contract_hash": manifest.contract_hash,
        "labels": list(manifest.labels),
        "outputs": [output.name for output in manifest.outputs],
    }


def check_replacement(old: Message, new: Message, *, backwards: bool = False) -> None:
    """Refuse a version that gives other answers than callers of the old one can take.

    Args:
        old: What ``InferenceService.describe`` says of the one that serves.
        new: The same of the other one.
        backwards: Whether it is one that has served before, which may lack an output that came later.

    Raises:
        ArtifactError: if it has another name, the same version, other labels, or lacks an output.
        ContractMismatchError: if it makes something else of a video.
    """
    if new["name"] != old["name"]:
        raise ArtifactError(
            f"the new bundle is of {new['name']}, and the server answers for {old['name']}",
            hint="a model of another name has another address: start a server of its own",
        )
    if new["version"] == old["version"]:
        raise ArtifactError(
            f"both bundles say that they are version {old['version']}; an answer could not say which one gave it",
            hint="export it again with another --model-version",
        )
    if new["contract_hash"] != old["contract_hash"]:
        raise ContractMismatchError(
            f"the new bundle has the contract {new['contract_hash'][:12]}, the one that serves "
            f"{old['contract_hash'][:12]}: they make different inputs of a video",
            hint="start a server of its own for it, and let callers change over",
        )
    if new["labels"] != old["labels"]:
        raise ArtifactError(
            f"the new bundle has {len(new['labels'])} labels, the one that serves {len(old['labels'])}, and they are "
            "not the same in the same order",
            hint="start a server of its own for it, and let callers change over",
        )
    missing = [name for name in old["outputs"] if name not in new["outputs"]]
    if missing and not backwards:
        raise ArtifactError(
            f"the new bundle lacks {', '.join(missing)}, which the one that serves gives",
            hint="export its heads too, or start a server of its own for it",
        )


def compare_answers(
    old: Answer, new: Answer, videos: Sequence[Path], *, min_agreement: float, on_done: Callable[[int], None]
) -> Shadow:
    """Have both versions answer for the same videos, one video after the other.

    Args:
        old: The one that serves; it goes on answering requests meanwhile.
        new: The other one.
        videos: Paths.
        min_agreement: Share of equal labels that the new one needs.
        on_done: Called with the number of videos that are done.
    """
    pairs = []
    with ThreadPoolExecutor(2, thread_name_prefix="shadow") as pool:
        for number, video in enumerate(videos, start=1):
            first, second = pool.submit(old, video), pool.submit(new, video)
            pairs.append(Pair(video=video, old=_said(first.result()), new=_said(second.result())))
            on_done(number)
    return Shadow(pairs=tuple(pairs), min_agreement=min_agreement)


def _said(answer: Message) -> Said:
    body = answer["body"]
    best = (body.get("predictions") or [{}])[0]
    return Said(
        status=answer["status"],
        label=best.get("label"),
        score=best.get("score", 0.0),
        code=body.get("code", ""),
        infer_ms=body.get("timings", {}).get("infer_ms", 0.0),
    )


def _median(said: Sequence[Said]) -> float | None:
    return statistics.median(each.infer_ms for each in said) if said else None


def _row(pair: Pair) -> dict[str, str]:
    return {"video": str(pair.video), "old": str(pair.old), "new": str(pair.new)}
