"""Weights of 8 bits, rounded together: what one takes away from a sum, those after it give back.

What a convolution reads is much alike from pixel to pixel and from frame to frame. Weights that are rounded each by
itself sum such values with an error that hardly averages out; of a published I3D it is four fifths of what 8 bits cost.
Which errors cancel is told by the second moments of what the convolution reads, over real clips (after Hassibi and
Stork, "Optimal Brain Surgeon", 1993, and Frantar et al., "GPTQ", 2023, who round language models so).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.int8.source import SourceGraph, attributes
from ivdr_deploy.export.layers import open_probe
from ivdr_deploy.spec import INPUT_NAME

_COLUMNS = 2048
"""Weights of one output that are rounded together at most, whole channels of them."""

_SAMPLES = 8192
"""Places of all clips at which a convolution is watched."""

_DAMPING = 0.01
"""Added to each second moment, of their mean: the clips do not tell everything."""

_BLOCK = 128
"""Columns whose corrections are passed on at once."""

_LARGEST_BIAS = 1 << 30
"""As it is stored: half of what a sum of 32 bits holds; no convolution fills the other half with its products."""

_MOST_BYTES = 512 << 20
"""Of second moments held at once; the clips pass once for so many."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Those of one convolution: ``real = stored * scale``, with one scale for each output channel."""

    stored: np.ndarray
    """int8 (outputs, channels, kt, kh, kw)."""

    scale: np.ndarray
    """float32 (outputs,)."""

    @property
    def real(self) -> np.ndarray:
        """What they stand for; float32."""
        real: np.ndarray = self.stored * self.scale.reshape(-1, *[1] * (self.stored.ndim - 1))
        return real.astype(np.float32)

    def beside(self, bias: np.ndarray, read: np.float32) -> Weights:
        """Return them with scales that a bias can be stored in, whose step is that of the weights times that of values.

        Where it cannot as they are, as in a channel of a batch norm that is a constant, weights are next to nothing
        beside the bias: what each of them loses by coarser steps is less than a millionth of it.

        Args:
            bias: float32 (outputs,).
            read: Scale of what the weights are multiplied with.
        """
        least = np.abs(bias) / (float(read) * _LARGEST_BIAS)
        scale = np.maximum(self.scale, least).astype(np.float32)
        smaller = (self.scale / scale).reshape(-1, *[1] * (self.stored.ndim - 1))
        return Weights(np.round(self.stored * smaller).astype(np.int8), scale)


def round_together(weights: np.ndarray, bits: int, moments: Sequence[np.ndarray]) -> Weights:
    """Round weights one after the other, and correct those still to come for what was lost.

    Args:
        weights: float32 (outputs, channels, kt, kh, kw).
        bits: 8, or 7 for processors whose 8-bit products would saturate.
        moments: Second moments of what they are multiplied with, one matrix for each part of ``channel_parts``.

    Raises:
        ExportError: if one is NaN or infinite.
    """
    limit = 2 ** (bits - 1) - 1
    largest = np.abs(weights).reshape(len(weights), -1).max(axis=1)
    scale = (np.maximum(largest, 1e-8) / limit).astype(np.float32)
    stored = []
    for part, moment in zip(channel_parts(weights), moments, strict=True):
        left = weights[:, part].reshape(len(weights), -1).astype(np.float64)
        stored.append(_round_columns(left / scale[:, None], limit, moment).reshape(weights[:, part].shape))
    return Weights(np.concatenate(stored, axis=1), scale)


def channel_parts(weights: np.ndarray) -> list[slice]:
    """Return which channels of a convolution are rounded together."""
    taps, channels = weights[0, 0].size, weights.shape[1]
    step = max(1, _COLUMNS // taps)
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def round_weights(source: SourceGraph, clips: np.ndarray, bits: int) -> dict[str, Weights]:
    """Round the weights of all convolutions of a graph, by the names of their constants.

    Args:
        source: The fp32 graph.
        clips: uint8 (N, T, H, W, 3), from real videos.
        bits: As in ``round_together``.
    """
    rounded = {}
    for name, node in _convolutions(source).items():
        if attributes(node)["group"] != 1:  # each weight by itself: a channel is read by its own group alone
            weights = source.constants[name]
            apart = [np.eye(weights[0, part].size) for part in channel_parts(weights)]
            rounded[name] = round_together(weights, bits, apart)
    for node, moments in _moments(source, clips):
        rounded[node.input[1]] = round_together(source.constants[node.input[1]], bits, moments)
    return rounded


def made_up_weights(source: SourceGraph) -> dict[str, Weights]:
    """Return zeros in place of what ``round_weights`` returns."""
    shapes = {name: source.constants[name].shape for name in _convolutions(source)}
    return {
        name: Weights(np.zeros(shape, np.int8), np.ones(shape[0], np.float32))
        for name, shape in shapes.items()
    }


def _round_columns(left: np.ndarray, limit: int, moment: np.ndarray) -> np.ndarray:
    """Round a matrix to whole numbers, column after column; (outputs, columns) -> int8 of the same shape."""
    columns = left.shape[1]
    if not np.isfinite(moment).all():
        raise ExportError(
            "the fp32 network gives NaN or infinity on the calibration clips, so it cannot become int8"
        )
    damped = moment.astype(np.float64)
    damped[np.diag_indices(columns)] += _DAMPING * np.diag(damped).mean() + 1e-12
    # Row j of the triangle: how an error in column j is best made good by the columns after it.
    triangle = np.linalg.cholesky(np.linalg.inv(damped)).T
    stored = np.empty(left.shape, np.int8)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = np.empty((len(left), end - start))
        for column in range(start, end):
            stored[:, column] = np.clip(np.round(left[:, column]), -limit, limit)
            error = (left[:, column] - stored[:, column]) / triangle[column, column]
            left[:, column:end] -= np.outer(error, triangle[column, column:end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ triangle[start:end, end:]
    return stored


def _convolutions(source: SourceGraph) -> dict[str, onnx.NodeProto]:
    """Return the convolutions of a graph by the names of their weights."""
    return {
        node.input[1]: node
        for node in source.nodes
        if node.op_type == "Conv" and node.input[1] in source.constants
    }


def _moments(source: SourceGraph, clips: np.ndarray) -> Iterator[tuple[onnx.NodeProto, list[np.ndarray]]]:
    """Yield each convolution with the second moments of what it reads, for the parts of its weights."""
    rng = np.random.default_rng(0)
    for nodes in _batches(source):
        reads = {node.input[1]: source.padded(node) for node in nodes}
        values = sorted({name for name, _ in reads.values()})
        sums: dict[str, list[np.ndarray]] = {}
        session = open_probe(source.model, values)
        for clip in clips:
            held = dict(zip(values, session.run(values, {INPUT_NAME: clip[None]}), strict=True))
            for node in nodes:
                name, pads = reads[node.input[1]]
                seen = patches(held[name][0], node, source, pads, -(-_SAMPLES // len(clips)), rng)
                for index, part in enumerate(channel_parts(source.constants[node.input[1]])):
                    columns = seen[:, part].reshape(len(seen), -1)
                    parts = sums.setdefault(node.input[1], [])
                    if index == len(parts):
                        parts.append(np.zeros((columns.shape[1],) * 2, np.float32))
                    parts[index] += columns.T @ columns / np.float32(len(seen) * len(clips))
        for node in nodes:
            yield node, sums.pop(node.input[1])


def _batches(source: SourceGraph) -> Iterator[list[onnx.NodeProto]]:
    """Yield the convolutions, as many at once as there is memory for their moments."""
    batch: list[onnx.NodeProto] = []
    held = 0
    for name, node in _convolutions(source).items():
        if attributes(node)["group"] != 1:
            continue
        weights = source.constants[name]
        size = sum(weights[0, part].size ** 2 for part in channel_parts(weights)) * 4
        if batch and held + size > _MOST_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(node)
        held += size
    if batch:
        yield batch


def patches(
    value: np.ndarray,
    node: onnx.NodeProto,
    source: SourceGraph,
    pads: Sequence[int],
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return what a convolution multiplies at some of its places; (places, channels, kt, kh, kw).

    Args:
        value: What it reads, float32 (channels, T, H, W).
        node: The convolution.
        source: Its graph.
        pads: Zeros before each of the three axes, then behind each.
        count: Of places at most.
        rng: Picks them.
    """
    given: Mapping[str, Sequence[int]] = attributes(node)
    kernel = source.constants[node.input[1]].shape[2:]
    whole = np.pad(value, [(0, 0), *zip(pads[:3], pads[3:], strict=True)])
    spans = [dilation * (size - 1) + 1 for dilation, size in zip(given["dilations"], kernel, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(whole, spans, axis=(1, 2, 3))
    (down, rows, columns), (apart, across, along) = given["strides"], given["dilations"]
    windows = windows[:, ::down, ::rows, ::columns, ::apart, ::across, ::along]
    places = windows.shape[1:4]
    number = int(np.prod(places))
    picked = np.unravel_index(rng.choice(number, min(count, number), replace=False), places)
    return windows[:, picked[0], picked[1], picked[2]].swapaxes(0, 1)
