"""Means over seeds with their intervals, paired differences, and the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Values = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""Data set -> protocol -> method -> one value per seed."""

FAIR, RECIPE = "clip, norm", "clip-sr-tc (ivdr)"
_PROTOCOLS = ("R@1", "probe", "order pairs", "fine-tune", "few labels", "ranking", "ranking, shuffled")
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
"""97.5 % points of Student's t for 1 to 15 degrees of freedom."""


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % t-interval over seeds; NaN for the latter where there is one seed."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    quantile = _T[min(len(values) - 1, len(_T)) - 1]
    return float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def render(values: Values, *, how: str) -> str:
    """Write the page."""
    lines = ["# What pre-training is worth", "", how, ""]
    for name, protocols in values.items():
        shown = sorted(protocols, key=lambda name: _PROTOCOLS.index(name) if name in _PROTOCOLS else 2.5)
        methods = list(dict.fromkeys(method for protocol in shown for method in protocols[protocol]))
        lines += [
            f"## {name}",
            "",
            f"| method | seeds | {' | '.join(shown)} |",
            "|---" * (len(shown) + 2) + "|",
        ]
        for method in methods:
            given = [protocols[protocol].get(method, ()) for protocol in shown]
            seeds = max(len(one) for one in given)
            lines.append(f"| {method} | {seeds} | {' | '.join(_cell(one) for one in given)} |")
        lines += ["", f"Differences in points, by seed, of `{RECIPE}` over:", ""]
        lines += [f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
        for method in methods:
            if method != RECIPE:
                cells = [
                    _difference(protocols[one].get(RECIPE, ()), protocols[one].get(method, ()))
                    for one in shown
                ]
                lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, half = mean_and_half_width(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def _difference(one: Sequence[float], other: Sequence[float]) -> str:
    """Spell the mean difference of the seeds that both have."""
    pairs = [100.0 * (a - b) for a, b in zip(one, other, strict=False)]
    if not pairs:
        return "-"
    mean, half = mean_and_half_width(pairs)
    return f"{mean:+.1f}" if math.isnan(half) else f"{mean:+.1f} ± {half:.1f}"
