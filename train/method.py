"""Settings of the method: which losses, their weights and temperatures, and two named sets of them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from ivdr_deploy._text import quoted
from ivdr_deploy.errors import ConfigError

Mode = Literal["clip", "clip-sr", "clip-sr-tc", "clip-tc"]
Form = Literal["simclr", "moco"]


def in_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuse a setting that is not finite or outside of [low, high].

    Raises:
        ConfigError: naming the setting, its value and the range.
    """
    # Compared with the largest number and not looked at for infinity: a whole number may be larger than any of those.
    if not low <= value <= min(high, sys.float_info.max):
        bound = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ConfigError(f"{name} must be {bound}, found {quoted(value)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DualConfig:
    """Losses of the dual representation. What is not given is the recipe ``ivdr``; see ``PRESETS``."""

    form: Form = "simclr"
    """``simclr``: contrast within the batch. ``moco``: against a queue of what a slowly moving copy of the network gave
    for earlier videos."""

    mode: Mode = "clip-sr-tc"
    """Losses that take part: the clip contrast, with the shuffle-rank loss (``sr``), with the temporal-coherent
    contrast of slot means (``tc``). Without ``sr`` two clips of a video are encoded instead of four."""

    clip_weight: float = 1.0
    """Weight of the clip contrast. The paper's eight-GPU SimCLR runs in effect used 0.125."""

    coherence_weight: float = 1.0
    """Weight of the temporal-coherent contrast of slot means."""

    rank_weight: float = 3.0
    """Weight of the shuffle-rank loss (the mean over its two pairs)."""

    clip_temperature: float = 0.07
    """Softmax temperature of the clip contrast."""

    coherence_temperature: float = 0.07
    """Softmax temperature of the temporal-coherent contrast."""

    rank_theta: float = 0.05
    """Temperature of the shuffle-rank loss."""

    rank_clamp: float = 0.0
    """Bound on (negative - positive) / theta, above which a comparison has no gradient; 0: no bound."""

    rank_exclude_identity: bool = True
    """Never draw the true order for the shuffled clip."""

    rank_warmup_steps: int = 0
    """First steps in which the shuffle-rank loss trains alone. Four slots and more need it."""

    bn_batches: Literal["joint", "reference"] = "joint"
    """``joint``: all clips of a step in one pass, with one set of batch statistics. ``reference``: the passes of the
    paper's code, in which shuffled clips have their own."""

    queue_length: int = 4096
    """Entries of the queue of ``moco`` (K). Longer than the list of videos it holds each video more than once."""

    momentum: float = 0.999
    """Share of its old weights that the copy of ``moco`` keeps in a step."""

    mask_same_video: bool = True
    """Whether entries of the queue of ``moco`` that come from the query's own video are left out of its negatives."""

    @property
    def contrasts_slots(self) -> bool:
        """Whether the temporal-coherent contrast takes part."""
        return self.mode.endswith("-tc") and self.coherence_weight > 0

    @property
    def ranks(self) -> bool:
        """Whether the shuffle-rank loss takes part."""
        return "-sr" in self.mode and self.rank_weight > 0

    @property
    def views(self) -> int:
        """Clips that are drawn from a video (V)."""
        return 3 if self.ranks else 2

    @property
    def clips_per_video(self) -> int:
        """Clips of a video that are encoded in a step."""
        return self.views + self.ranks

    def order_chance(self, slots: int) -> float:
        """Return the ranking accuracy of an encoder that does not see order, for S slots."""
        true = 1.0 / math.factorial(slots) if self.rank_exclude_identity else 0.0
        return (0.5 - true) / (1.0 - true)

    @property
    def trained_heads(self) -> tuple[str, ...]:
        """The heads that the losses reach."""
        series = self.contrasts_slots or self.ranks
        return ("clip_head",) * bool(self.clip_weight) + ("series_head",) * bool(series)

    def __post_init__(self) -> None:
        for name in ("clip_weight", "coherence_weight", "rank_weight", "rank_clamp", "rank_warmup_steps"):
            in_range(name, getattr(self, name), 0.0)
        for name in ("clip_temperature", "coherence_temperature", "rank_theta"):
            in_range(name, getattr(self, name), 1e-4)
        in_range("queue_length", self.queue_length, 2, 10_000_000)
        in_range("momentum", self.momentum, 0.0, 1.0)
        if not self.trained_heads:
            raise ConfigError(
                "every loss has the weight 0", hint="set one of clip, coherence and rank_weight"
            )
        if self.rank_warmup_steps and not self.ranks:
            raise ConfigError("rank_warmup_steps is for a mode with sr, and a rank_weight above 0")


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "ivdr": {"model": {"head_norm": "series"}, "dual": {}},
    "paper": {
        "model": {"head_norm": "none"},
        "dual": {
            "rank_weight": 1.0,
            "rank_clamp": 5.0,
            "rank_exclude_identity": False,
            "bn_batches": "reference",
            "queue_length": 16384,
            "mask_same_video": False,
        },
    },
}
"""Settings that a name stands for; what is given besides it wins.

``ivdr``, the default, is what makes the shuffle-rank loss leave chance: a batch norm in front of the series head, no
clamp, every clip truly shuffled, one batch of statistics. ``paper`` is Zhang et al. (BMVC 2021) as its code has it.
"""


def fill_preset(values: dict[str, Any]) -> None:
    """Replace the key ``preset`` of settings, ``ivdr`` where there is none, by what it stands for.

    Raises:
        ConfigError: if there is none of that name.
    """
    name = values.pop("preset", "ivdr")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {quoted(name)}")
    for table, settings in PRESETS[name].items():
        given = values.get(table, {})
        if isinstance(given, dict):  # anything else is refused when all are read
            if (name, table) == ("paper", "dual") and given.get("form") == "moco":
                settings = settings | {"rank_clamp": 0.0}  # the paper's MoCo has no bound
            values[table] = settings | given
