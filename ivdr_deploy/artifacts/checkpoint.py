"""Checkpoints: one ``.safetensors`` file with weights, golden clips, and everything needed to use them.

Tensors are named ``model.<state key>`` and ``golden.video``; the metadata entry ``ivdr`` holds the
``CheckpointInfo`` as JSON. Nothing in the file is executed when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import is_utf8, quoted, reason_of
from ivdr_deploy.artifacts import former
from ivdr_deploy.errors import CheckpointError, ClipShapeError, ConfigError, ContractMismatchError
from ivdr_deploy.records import from_dict, parse_json, to_dict
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, canonical_json

if TYPE_CHECKING:
    from ivdr_deploy.models.network import VideoModel

_METADATA_KEY = "ivdr"
_MODEL_PREFIX = "model."
_GOLDEN_KEY = "golden.video"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    model: VideoModel
    """In eval mode, on the CPU."""

    info: CheckpointInfo
    golden: np.ndarray
    """uint8 (G, T, H, W, 3): real clips, to show that an exported model still computes the same."""


def save_checkpoint(path: str | Path, *, model: VideoModel, info: CheckpointInfo, golden: np.ndarray) -> None:
    """Write a checkpoint; ``path`` holds the old file or the whole new one, whatever happens.

    Args:
        path: Ends in ``.safetensors``.
        model: Built from ``info.model``.
        info: What the file says about itself.
        golden: uint8 (G, T, H, W, 3), G >= 1, clips made under ``info.clip``.

    Raises:
        ClipShapeError: if ``golden`` is not that.
        OSError: if the file cannot be written.
    """
    import torch
    from safetensors.torch import save

    _check_golden(golden, info.clip)
    tensors = {
        _MODEL_PREFIX + name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    tensors[_GOLDEN_KEY] = torch.from_numpy(np.ascontiguousarray(golden))
    with atomic_path(Path(path)) as temporary:
        # Not save_file: a full disk would be an error of its own kind.
        temporary.write_bytes(save(tensors, metadata={_METADATA_KEY: canonical_json(to_dict(info))}))


def read_checkpoint_info(path: str | Path) -> CheckpointInfo:
    """Read what a checkpoint says about itself, without its weights and without torch.

    Raises:
        CheckpointError: if the file is missing, damaged, cut short, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", hint="`python -m train finetune` writes one")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable .safetensors file ({reason_of(error)})",
            hint="copy it again, or train again",
        ) from error
    if _METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} is a .safetensors file, but not a checkpoint of ivdr_deploy",
            hint="use one written by `python -m train`",
        )
    try:
        values = parse_json(metadata[_METADATA_KEY])
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: its description is {type(values).__name__}, expected a table")
        version = former.check_version(values.get("format_version"), where=str(path), error=CheckpointError)
        if version == 1:
            values = former.upgrade_checkpoint(values, where=str(path))
        return from_dict(CheckpointInfo, values, where=str(path))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path} describes itself wrongly ({reason_of(error, most=300)})", hint="train again"
        ) from error


def load_checkpoint(path: str | Path, *, expected_clip: ClipSpec | None = None) -> Checkpoint:
    """Read a checkpoint and build its network, strictly: every weight must be there, and no other.

    Args:
        path: The file.
        expected_clip: A contract that the checkpoint's must equal.

    Raises:
        CheckpointError: if the file is missing, damaged or not one of ours, or its weights do not fit.
        ContractMismatchError: if the contract is not ``expected_clip``; names each field that differs.
    """
    import torch
    from safetensors.torch import load_file

    from ivdr_deploy.models.network import build_model

    path = Path(path)
    if not is_utf8(path):
        raise CheckpointError(
            f"the path {path} is not UTF-8 in this locale, and safetensors opens no other",
            hint="rename it, or set LC_ALL=C.UTF-8",
        )
    info = read_checkpoint_info(path)
    if expected_clip is not None and info.clip != expected_clip:
        raise ContractMismatchError(
            f"{path} was made for another contract ({'; '.join(info.clip.differences(expected_clip))})",
            hint="train with the same clip settings, or use the checkpoint's own",
        )
    try:
        tensors = load_file(path)
        golden = tensors.pop(_GOLDEN_KEY).numpy()
        _check_golden(golden, info.clip)
        if any(not name.startswith(_MODEL_PREFIX) for name in tensors):
            raise CheckpointError(f"{path} holds tensors that are neither weights nor golden clips")
        weights = {name.removeprefix(_MODEL_PREFIX): value for name, value in tensors.items()}
        with torch.device("meta"):  # takes no memory: a damaged description may ask for any amount
            _check_weights(build_model(info.model, info.clip), weights)
        model = build_model(info.model, info.clip)
        model.load_state_dict(weights)
    except KeyError as error:
        raise CheckpointError(f"{path} has no golden clips", hint="train again") from error
    except (SafetensorError, OSError, ConfigError, ClipShapeError, RuntimeError, TypeError) as error:
        reason = reason_of(error, most=300, whole=True)
        raise CheckpointError(
            f"{path} does not fit its own description ({reason})", hint="train again"
        ) from error
    return Checkpoint(path=path, model=model.eval(), info=info, golden=golden)


def _check_weights(model: VideoModel, weights: Mapping[str, Any]) -> None:
    """Compare the weights of a file with those of a network, before one with memory is built.

    Raises:
        RuntimeError: if one is missing, too many, or has another shape or dtype.
    """
    expected = model.state_dict()
    if differing := sorted(expected.keys() ^ weights.keys()):
        what = "missing" if differing[0] in expected else "unexpected"
        raise RuntimeError(f"{len(differing)} weights differ, {quoted(differing[0])} is {what}")
    for name, value in expected.items():
        found = weights[name]
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise RuntimeError(
                f"{name} is {found.dtype} of shape {tuple(found.shape)}, expected {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )


def _check_golden(golden: np.ndarray, clip: ClipSpec) -> None:
    if golden.dtype != np.uint8 or golden.ndim != 5 or golden.shape[1:] != clip.clip_shape or not len(golden):
        expected = ("G", *clip.clip_shape)
        raise ClipShapeError(
            f"golden clips have dtype {golden.dtype} and shape {golden.shape}; expected uint8 {expected}"
        )
