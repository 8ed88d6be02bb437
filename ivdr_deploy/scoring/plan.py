"""What decides the rows of a table: the model and the options, and nothing of the list.

Nothing here depends on time, host or chance. The list may change between two runs into one folder, the plan may not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ivdr_deploy._text import cut, one_line, quoted
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import ViewPlan, canonical_json

TABLE_VERSION = 5
"""Raised whenever the columns, their meaning or what a shard says about itself change; 5: keys spell size and time."""

_NAMED = 50
"""Settings that a message names, more than a plan has."""

VECTOR_OUTPUTS = ("feature", "inter", "intra")
"""Outputs that can be stored beside the labels."""


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
    """Whether to store the SHA-256 of every file, which then tells files apart, instead of size and time of change.
    Every file is read once more for it, in every run."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, found {self.top_k}")
        for name in self.outputs:
            if name not in VECTOR_OUTPUTS:
                raise ConfigError(
                    f"unknown output {quoted(name)}; expected any of {', '.join(VECTOR_OUTPUTS)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """Everything that decides what the row of an input is. Equal plans give equal rows, timings aside."""

    table_version: int = TABLE_VERSION
    ivdr_version: str
    """Another version may read the same file differently, and a table must not be a mixture."""

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

    software: dict[str, str] = field(default_factory=dict)
    """Versions of what decodes."""

    share: str = ""
    """``i/n`` where the table holds one share of a list."""

    @property
    def run_id(self) -> str:
        """The first 16 hex digits of the SHA-256 of this plan's canonical JSON."""
        return hashlib.sha256(canonical_json(to_dict(self)).encode()).hexdigest()[:16]

    def differences(self, other: RunPlan) -> dict[str, str]:
        """Return every field in which two plans differ, with its two values as ``mine, not theirs``."""
        mine, theirs = _flat(to_dict(self)), _flat(to_dict(other))
        names = dict.fromkeys([*mine, *theirs])
        return {
            name: f"{_short(mine.get(name))}, not {_short(theirs.get(name))}"
            for name in names
            if mine.get(name) != theirs.get(name)
        }


def name_differences(differences: Mapping[str, str]) -> str:
    """Name the settings of ``RunPlan.differences`` on one line; a file that somebody made may have any number."""
    named = [f"{cut(name, 60)}: {values}" for name, values in differences.items()]
    more = f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return one_line("; ".join(named[:_NAMED])) + more


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
    text = str(value) if value not in ("", ()) else "none"
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return one_line(cut(text, 60))
