"""Inception-3D a second time, written for the tests: plain functions over the arrays of the published pickle.

Nothing of the package is used: the arrays keep their names and TensorFlow's order, and SAME padding and pooling are
done as TensorFlow documents them.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
LOGITS = "Logits/Conv3d_0c_1x1"


def make_variables(*, seed: int = 0, classes: int = 400) -> dict[str, Any]:
    """Random weights in the published form: two dicts, 230 float32 arrays."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0, centre: float = 0.0) -> np.ndarray:
        return (centre + scale * rng.standard_normal(shape)).astype(np.float32)

    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}

    def unit(place: tuple[dict[str, Any], dict[str, Any]], name: str, inside: int, out: int, k: int) -> None:
        kernel = normal(k, k, k, inside, out, scale=(2 / (inside * k**3)) ** 0.5)
        place[0][name] = {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": normal(out, scale=0.2)}}
        mean, var = normal(1, 1, 1, 1, out, scale=0.1), normal(1, 1, 1, 1, out, scale=0.1, centre=1)
        place[1][name] = {"BatchNorm_0": {"mean": mean, "var": var}}

    for name, inside, out, k in [
        ("Conv3d_1a_7x7", 3, 64, 7),
        ("Conv3d_2b_1x1", 64, 64, 1),
        ("Conv3d_2c_3x3", 64, 192, 3),
    ]:
        unit((params, stats), name, inside, out, k)
    for name, (inside, one, into1, out1, into2, out2, pooled) in MIXED.items():
        place = params.setdefault(name, {}), stats.setdefault(name, {})
        unit(place, "Branch_0/Conv3d_0a_1x1", inside, one, 1)
        unit(place, "Branch_1/Conv3d_0a_1x1", inside, into1, 1)
        unit(place, "Branch_1/Conv3d_0b_3x3", into1, out1, 3)
        unit(place, "Branch_2/Conv3d_0a_1x1", inside, into2, 1)
        unit(place, "Branch_2/Conv3d_0b_3x3", into2, out2, 3)
        unit(place, "Branch_3/Conv3d_0b_1x1", inside, pooled, 1)
    kernel = normal(1, 1, 1, 1024, classes, scale=0.05)
    params[LOGITS] = {"Conv_0": {"kernel": kernel, "bias": normal(classes, scale=0.1)}}
    return {"params": params, "batch_stats": stats}


def write_variables(path: Path, variables: dict[str, Any]) -> Path:
    path.write_bytes(pickle.dumps(variables, protocol=4))
    return path


def logits(variables: dict[str, Any], clip: np.ndarray) -> np.ndarray:
    """Map one clip, uint8 (T, H, W, 3), to the logits (K,)."""
    params, stats = variables["params"], variables["batch_stats"]
    x = torch.from_numpy(clip.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)[None]
    x = _unit(x, params["Conv3d_1a_7x7"], stats["Conv3d_1a_7x7"], stride=2)
    x = _max_pool(x, (1, 3, 3), (1, 2, 2))
    x = _unit(x, params["Conv3d_2b_1x1"], stats["Conv3d_2b_1x1"])
    x = _unit(x, params["Conv3d_2c_3x3"], stats["Conv3d_2c_3x3"])
    x = _max_pool(x, (1, 3, 3), (1, 2, 2))
    for name in MIXED:
        if name == "Mixed_4b":
            x = _max_pool(x, (3, 3, 3), (2, 2, 2))
        if name == "Mixed_5b":
            x = _max_pool(x, (2, 2, 2), (2, 2, 2))
        x = _mixed(x, params[name], stats[name])
    x = F.avg_pool3d(x, (2, *x.shape[3:]), stride=1)  # 7 x 7 at 224 pixels
    head = params[LOGITS]["Conv_0"]
    kernel = torch.from_numpy(head["kernel"].transpose(4, 3, 0, 1, 2).copy())
    x = F.conv3d(x, kernel, torch.from_numpy(head["bias"].copy()))
    return np.asarray(x.squeeze(4).squeeze(3).mean(dim=2)[0])


def _same(x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], value: float) -> torch.Tensor:
    pads = []
    for axis in (2, 1, 0):
        size = x.shape[axis + 2]
        rest = size % stride[axis] or stride[axis]
        total = max(kernel[axis] - rest, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def _unit(x: torch.Tensor, weights: Any, stats: Any, *, stride: int = 1) -> torch.Tensor:
    kernel = torch.from_numpy(weights["Conv_0"]["kernel"].transpose(4, 3, 0, 1, 2).copy())
    x = F.conv3d(_same(x, kernel.shape[2:], (stride,) * 3, 0.0), kernel, stride=stride)
    mean, var = (
        torch.from_numpy(stats["BatchNorm_0"][name].reshape(1, -1, 1, 1, 1)) for name in ("mean", "var")
    )
    bias = torch.from_numpy(weights["BatchNorm_0"]["bias"].reshape(1, -1, 1, 1, 1))
    return torch.relu((x - mean) / torch.sqrt(var + 1e-3) + bias)


def _max_pool(x: torch.Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> torch.Tensor:
    return F.max_pool3d(_same(x, kernel, stride, float("-inf")), kernel, stride)


def _mixed(x: torch.Tensor, weights: Any, stats: Any) -> torch.Tensor:
    def unit(x: torch.Tensor, name: str) -> torch.Tensor:
        return _unit(x, weights[name], stats[name])

    return torch.cat(
        [
            unit(x, "Branch_0/Conv3d_0a_1x1"),
            unit(unit(x, "Branch_1/Conv3d_0a_1x1"), "Branch_1/Conv3d_0b_3x3"),
            unit(unit(x, "Branch_2/Conv3d_0a_1x1"), "Branch_2/Conv3d_0b_3x3"),
            unit(_max_pool(x, (3, 3, 3), (1, 1, 1)), "Branch_3/Conv3d_0b_1x1"),
        ],
        dim=1,
    )


def conv_at(
    x: np.ndarray, kernel: np.ndarray, place: tuple[int, int, int], stride: int, stats: Any, bias: np.ndarray
) -> np.ndarray:
    """One place of a unit's output in numpy, (C_out,): sum, batch norm, ReLU. ``x`` is (T, H, W, C)."""
    size = kernel.shape[0]
    total = np.zeros(kernel.shape[-1], np.float64)
    for offset in np.ndindex(size, size, size):
        where = []
        for axis in range(3):
            out = -(-x.shape[axis] // stride)
            before = max((out - 1) * stride + size - x.shape[axis], 0) // 2
            where.append(place[axis] * stride - before + offset[axis])
        if all(0 <= index < extent for index, extent in zip(where, x.shape[:3], strict=True)):
            total += x[tuple(where)].astype(np.float64) @ kernel[offset].astype(np.float64)
    mean, var = (stats["BatchNorm_0"][name].reshape(-1).astype(np.float64) for name in ("mean", "var"))
    return np.maximum((total - mean) / np.sqrt(var + 1e-3) + bias, 0)
