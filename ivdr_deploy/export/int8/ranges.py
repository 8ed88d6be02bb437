"""Which values an 8-bit tensor must tell apart, from what it holds while real clips pass through the fp32 graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from ivdr_deploy.export.int8.scales import Ranges
from ivdr_deploy.export.layers import open_probe
from ivdr_deploy.spec import INPUT_NAME

Method = Literal["min-max", "percentile", "entropy"]

_BINS = 2048
_LEVELS = 256
_TAIL = 1e-4
"""Share of the values at each end that ``percentile`` gives up."""

_SHARES = np.linspace(0.2, 1.0, 41)
"""How much of the whole range ``entropy`` tries to keep."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """The values of one tensor over all calibration clips."""

    low: float
    high: float
    counts: np.ndarray
    """int64 (2048,), equal bins from ``low`` to ``high``."""


def observe(model: onnx.ModelProto, clips: np.ndarray, names: Sequence[str]) -> dict[str, Histogram]:
    """Run clips through the fp32 graph and note what its tensors hold.

    Args:
        model: The fp32 graph.
        clips: uint8 (N, T, H, W, 3).
        names: Tensors to look at.

    Returns:
        One histogram per name. The clips pass twice: once for the ends, once for the counts, so that memory is bounded
        by one clip.
    """
    session = open_probe(model, names)

    def values(clip: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = session.run(list(names), {INPUT_NAME: clip[None]})
        return found

    lows, highs = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for clip in clips:
        for place, value in enumerate(values(clip)):
            lows[place] = min(lows[place], value.min())
            highs[place] = max(highs[place], value.max())
    widths = np.maximum(highs - lows, 1e-12)
    counts = np.zeros((len(names), _BINS), np.int64)
    for clip in clips:
        for place, value in enumerate(values(clip)):
            bins = ((value.ravel() - lows[place]) * (_BINS / widths[place])).astype(np.int32)
            counts[place] += np.bincount(np.clip(bins, 0, _BINS - 1), minlength=_BINS)
    return {
        name: Histogram(float(low), float(high), count)
        for name, low, high, count in zip(names, lows, highs, counts, strict=True)
    }


def choose_ranges(histograms: dict[str, Histogram], method: Method) -> Ranges:
    """Pick the range of every tensor by one method."""
    pick: dict[Method, Callable[[Histogram], tuple[float, float]]] = {
        "min-max": lambda histogram: (histogram.low, histogram.high),
        "percentile": _percentile,
        "entropy": _entropy,
    }
    return {name: pick[method](histogram) for name, histogram in histograms.items()}


def _percentile(histogram: Histogram) -> tuple[float, float]:
    """Leave out the outermost values."""
    share = np.cumsum(histogram.counts) / max(1, histogram.counts.sum())
    edges = np.linspace(histogram.low, histogram.high, _BINS + 1)
    first, last = int(np.searchsorted(share, _TAIL)), int(np.searchsorted(share, 1 - _TAIL))
    return float(edges[min(first, _BINS - 1)]), float(edges[min(last, _BINS - 1) + 1])


def _entropy(histogram: Histogram) -> tuple[float, float]:
    """Keep the share of the range with which the 256 levels say most about the values (Kullback-Leibler).

    After Migacz, "8-bit Inference with TensorRT" (GTC 2017), here for a range that need not begin at zero.
    """
    centres = (
        np.linspace(histogram.low, histogram.high, _BINS + 1)[:-1]
        + (histogram.high - histogram.low) / _BINS / 2
    )
    truth = histogram.counts / max(1, histogram.counts.sum())
    best, best_share = np.inf, 1.0
    for share in _SHARES:
        low, high = min(histogram.low * share, 0.0), max(histogram.high * share, 0.0)
        levels = np.clip(
            np.round((centres - low) / max(high - low, 1e-12) * (_LEVELS - 1)), 0, _LEVELS - 1
        ).astype(int)
        # What a level holds, spread evenly over the values that it stands for and that occur within the range.
        inside = (centres >= low) & (centres <= high) & (truth > 0)
        held = np.bincount(levels, truth, minlength=_LEVELS)
        places = np.bincount(levels[inside], minlength=_LEVELS)
        told = np.where(inside, held[levels] / np.maximum(places[levels], 1), 1e-9)
        occurs = truth > 0
        divergence = float((truth[occurs] * np.log(truth[occurs] / np.maximum(told[occurs], 1e-9))).sum())
        if divergence < best:
            best, best_share = divergence, float(share)
    return histogram.low * best_share, histogram.high * best_share
