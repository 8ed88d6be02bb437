"""What makes two scoring runs the same run, and how a run is cut into shards.

Nothing here depends on time, host or chance: the same model, list and options give the same run id and the
same shard names. A run that was stopped is therefore continued by computing the shards that are absent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import ViewPlan, canonical_json

TABLE_VERSION = 3
"""Raised whenever the columns, their meaning or what a shard says about itself change; 3: a digest of the latter."""

VECTOR_OUTPUTS = ("feature", "inter", "intra")
"""Outputs that can be stored beside the labels."""

MIN_SHARD_VIDEOS = 32
MAX_SHARDS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """What a row holds."""

    top_k: int = 5
    """Labels and scores per video; a model with fewer classes gives all of them."""

    outputs: tuple[str, ...] = ()
    """Vectors to store: any of ``VECTOR_OUTPUTS`` that the model has."""

    view_plan: ViewPlan | None = None
    """Clips of a video instead of those of the model's own plan."""

    hash_files: bool = False
    """Whether to store the SHA-256 of every file, which reads it once more. A run that goes on, or finds its table
    complete, reads the files of the rows that are there again, and refuses if one was replaced."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, found {self.top_k}")
        for name in self.outputs:
            if name not in VECTOR_OUTPUTS:
                raise ConfigError(
                    f"unknown output {quoted(name)}; expected any of {', '.join(VECTOR_OUTPUTS)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of the table: the rows of inputs ``start`` to ``stop - 1``."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """Everything that decides what the rows are. Equal plans give equal tables, timings aside."""

    table_version: int = TABLE_VERSION
    ivdr_version: str
    """Another version may read the same file differently, and a table must not be a mixture."""

    videos: int
    """Number of inputs."""

    videos_sha256: str
    """Identity of the list: uri, label and size in bytes of every input, in order. A file that was replaced by one of
    the same size is not noticed, unless ``hash_files``: then the digests in the rows are held against the files."""

    model: str
    model_version: str
    model_sha256: str
    """Of the file that the runtime executes."""

    variant: str
    runtime: str
    """What executes it: library, version, device, precision."""

    contract_hash: str
    view_plan: ViewPlan
    top_k: int
    outputs: tuple[str, ...] = ()
    hash_files: bool
    decoder: str
    limits: dict[str, Any] = field(default_factory=dict)
    """Of decoding, see ``video.reader.VideoLimits``: they decide which videos are errors."""

    shard_videos: int
    """Rows per shard."""

    def __post_init__(self) -> None:
        if self.videos < 0 or self.shard_videos < 1:
            raise ConfigError(f"no run has {self.videos} videos in shards of {self.shard_videos}")

    @property
    def run_id(self) -> str:
        """The first 16 hex digits of the SHA-256 of this plan's canonical JSON."""
        return hashlib.sha256(canonical_json(to_dict(self)).encode()).hexdigest()[:16]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, in input order; every input lies in exactly one."""
        starts = range(0, self.videos, self.shard_videos)
        return tuple(
            Shard(
                name=f"part-{index:05d}-of-{len(starts):05d}-{self.run_id}.parquet",
                start=start,
                stop=min(start + self.shard_videos, self.videos),
            )
            for index, start in enumerate(starts)
        )

    def differences(self, other: RunPlan) -> dict[str, str]:
        """Return every field in which two plans differ, with its two values as ``mine, not theirs``."""
        mine, theirs = _flat(to_dict(self)), _flat(to_dict(other))
        names = dict.fromkeys([*mine, *theirs])
        return {
            name: f"{_short(mine.get(name))}, not {_short(theirs.get(name))}"
            for name in names
            if mine.get(name) != theirs.get(name)
        }


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Spell nested tables with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": deeper for inner, deeper in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= 60 else f"{text[:60]}..."


def shard_videos(videos: int) -> int:
    """Choose the rows per shard: 32, or a thousandth of a large collection.

    A kill loses the shard in work. Smaller shards would lose less, but a folder of 30 000 small files is slow
    to read for ever after.
    """
    return max(MIN_SHARD_VIDEOS, -(-videos // MAX_SHARDS))


def video_id(uri: str) -> str:
    """Return the id of an input: the first 16 hex digits of the SHA-256 of its uri.

    It depends on nothing else, so that the tables of two models over overlapping lists can be joined on it.
    """
    return hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:16]
