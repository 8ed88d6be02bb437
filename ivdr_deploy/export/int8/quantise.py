"""fp32 ONNX file + real clips -> int8 ONNX file, with the calibration that changes the outputs least."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import onnx

from ivdr_deploy._optional import import_onnxruntime
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.int8.equalise import equalised
from ivdr_deploy.export.int8.ranges import Method, choose_ranges, observe
from ivdr_deploy.export.int8.scales import Ranges, quantised_tensors, round_trip
from ivdr_deploy.export.int8.source import SourceGraph
from ivdr_deploy.export.int8.weights import Weights, made_up_weights, round_weights
from ivdr_deploy.export.layers import layer_errors
from ivdr_deploy.spec import INPUT_NAME

_HELD_OUT = 3
"""Every third clip judges the calibration instead of taking part in it."""

_LEAST_CLIPS = 2 * _HELD_OUT


Write = Callable[[SourceGraph, Ranges, Mapping[str, Weights], Collection[str]], onnx.ModelProto]
"""Makes an int8 graph from the fp32 one, the ranges of its tensors, its rounded weights, and the names of convolutions
that stay in fp32: ``channels_last.lower``, ``qdq.insert_pairs`` or ``qdq.insert_fp8_pairs``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What real clips tell of an fp32 graph, whatever form it takes in 8 bits."""

    source: SourceGraph
    """The graph with equalised channels."""

    rounded: Mapping[str, Weights]
    """Its weights, by the names of their constants."""

    candidates: Mapping[Method, Ranges]
    """Of its tensors, by every method."""

    clips: np.ndarray
    """Those that judge the methods; uint8 (N, T, H, W, 3)."""

    expected: list[np.ndarray]
    """Outputs of the fp32 graph for them."""

    number: int
    """Of all clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantised:
    """An int8 graph and how it came about."""

    source: SourceGraph
    """The fp32 graph with equalised channels."""

    rounded: Mapping[str, Weights]
    """Its weights, by the names of their constants."""

    ranges: Ranges
    """Of the method that was chosen."""

    write: Write
    clips: np.ndarray
    """Those that judged; uint8 (N, T, H, W, 3)."""

    method: Method
    errors: dict[Method, float]
    """For every method that was tried: the relative difference from fp32 of the output that differs most, over the
    clips that were held out."""

    def keeping(self, kept: Collection[str]) -> onnx.ModelProto:
        """Return the int8 graph with some convolutions in fp32, by the names of their nodes."""
        return self.write(self.source, self.ranges, self.rounded, kept)

    def by_error(self) -> list[str]:
        """Return the names of the convolutions, the one that adds most error first: of int8, whatever the form is."""

        def round_value(name: str, nodes: list[onnx.NodeProto]) -> str:
            read = self.source.padding.get(name, (name,))[0]
            if read not in self.ranges:  # also what a convolution gives: the one that reads it rounds it
                return name
            if name not in rounded:
                rounded.add(name)
                nodes.extend(round_trip(name, f"{name}/rounded", *self.ranges[read]))
            return f"{name}/rounded"

        def round_constant(name: str) -> np.ndarray | None:
            return self.rounded[name].real if name in self.rounded else self.source.constants.get(name)

        rounded: set[str] = set()
        names = [node.name for node in self.source.nodes if node.op_type == "Conv"]
        errors = layer_errors(
            self.source.model, self.clips, names, round_value=round_value, round_constant=round_constant
        )
        return sorted(names, key=lambda name: -errors[name])


def require_form(path: Path, write: Write) -> None:
    """Refuse an fp32 graph that has no such 8-bit form, whatever the clips: before minutes are spent on decoding them.

    Args:
        path: The fp32 file that ``export_onnx`` wrote.
        write: What the form is. It is written, with ranges and weights that are made up.

    Raises:
        ExportError: if it has none; names the layer or the operator.
    """
    source = SourceGraph(onnx.load(path))
    ranges = dict.fromkeys(set().union(*quantised_tensors(source)), (0.0, 1.0))
    write(source, ranges, made_up_weights(source), ())


def calibrate(path: Path, clips: np.ndarray, *, weight_bits: int = 8) -> Calibrated:
    """Run clips through an fp32 graph, and round its weights.

    Args:
        path: The fp32 file that ``export_onnx`` wrote.
        clips: uint8 (N, T, H, W, 3), N >= 6, from real videos.
        weight_bits: 8, or 7 for processors whose 8-bit products would saturate.

    Raises:
        ExportError: if there are too few clips, or the graph holds what has no 8-bit form.
    """
    if len(clips) < _LEAST_CLIPS:
        raise ExportError(
            f"{len(clips)} clips are too few to calibrate with; at least {_LEAST_CLIPS} are needed",
            hint="give a longer list with --calibrate",
        )
    judges = np.arange(len(clips)) % _HELD_OUT == _HELD_OUT - 1
    source = SourceGraph(equalised(onnx.load(path), clips[~judges]))
    rounded = round_weights(source, clips[~judges], weight_bits)
    names = sorted(set().union(*quantised_tensors(source)))
    histograms = observe(source.model, clips[~judges], names)
    return Calibrated(
        source=source,
        rounded=rounded,
        candidates={method: choose_ranges(histograms, method) for method in get_args(Method)},
        clips=clips[judges],
        expected=_outputs(source.model, clips[judges]),
        number=len(clips),
    )


def quantise(given: Calibrated, write: Write) -> Quantised:
    """Make the int8 form of a graph, with the ranges that change its outputs least.

    Args:
        given: The graph.
        write: What the form is.

    Raises:
        ExportError: if the graph holds what has no such form.
    """
    errors: dict[Method, float] = {}
    for method, ranges in given.candidates.items():
        made = write(given.source, ranges, given.rounded, ())
        errors[method] = _relative_error(given.expected, _outputs(made, given.clips))
    best = min(errors, key=lambda method: errors[method])
    return Quantised(
        source=given.source,
        rounded=given.rounded,
        ranges=given.candidates[best],
        write=write,
        clips=given.clips,
        method=best,
        errors=errors,
    )


def _outputs(model: onnx.ModelProto, clips: np.ndarray) -> list[np.ndarray]:
    from ivdr_deploy.runtimes.ort_runtime import WRONG_REWRITES

    session = import_onnxruntime().InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"], disabled_optimizers=WRONG_REWRITES
    )
    parts = [session.run(None, {INPUT_NAME: clip[None]}) for clip in clips]
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


def _relative_error(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Return the root of the mean square difference over that of the values, of the output where it is largest."""
    errors = [
        np.square(a - b).mean() / max(np.square(a).mean(), 1e-12)
        for a, b in zip(expected, found, strict=True)
    ]
    return float(np.sqrt(max(errors)))
