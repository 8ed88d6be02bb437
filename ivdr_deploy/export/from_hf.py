"""Video classifiers of Hugging Face from a local folder: its configurations and safetensors, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ivdr_deploy._files import sha256_file
from ivdr_deploy._optional import require
from ivdr_deploy._text import one_line, quoted
from ivdr_deploy.errors import CheckpointError, ConfigError
from ivdr_deploy.export.importing import Imported, assign_weights
from ivdr_deploy.models.hf import Architecture, architecture, describe
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec, ViewPlan

CONFIG_FILE = "config.json"
PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

_LABEL_KEYS = ("id2label", "label2id", "num_labels")
_BILINEAR = 2
_UNEXPRESSED = ("do_pad", "do_flip_channel_order")
"""Steps of a processor that the contract has no word for."""


def read(name: str, weights: Path | None) -> Imported:
    """Read a folder. Only its configurations and safetensors are opened, and no code in it is run.

    Args:
        name: The folder.
        weights: None: they are in the folder.

    Raises:
        ConfigError: if ``weights`` is given.
        CheckpointError: if a file is missing or damaged, or asks for what the contract or this package does not have.
        MissingDependencyError: if transformers is not installed.
    """
    transformers: Any = require("transformers", extra="hf")
    if weights is not None:
        raise ConfigError("the weights of hf: lie in its folder", hint="leave --weights out")
    folder = Path(name)
    config = _read_json(folder / CONFIG_FILE)
    processor_file = next((folder / file for file in PROCESSOR_FILES if (folder / file).is_file()), None)
    if processor_file is None:
        raise CheckpointError(f"{one_line(folder)} holds none of {', '.join(PROCESSOR_FILES)}")
    weights_file = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights_file is None:
        raise CheckpointError(
            f"{one_line(folder)} holds none of {', '.join(WEIGHT_FILES)}",
            hint="only safetensors are read: a pytorch_model.bin is a pickle, which can run what it likes",
        )
    labels = _labels(config, where=one_line(folder / CONFIG_FILE))
    kept = {
        key: value for key, value in config.items() if key not in (*_LABEL_KEYS, "auto_map", "architectures")
    }
    try:
        found, shape = architecture(kept), describe(kept)
        stride = max(1, found.span // shape.num_frames)
        own = _OwnProcessor(transformers, found, _read_json(processor_file), where=one_line(processor_file))
        clip = ClipSpec(num_frames=shape.num_frames, frame_stride=stride, **own.contract())
        if clip.crop_size != shape.size:
            raise ConfigError(
                f"the preprocessor gives {clip.crop_size} pixels, the network takes {shape.size}"
            )
        spec = ModelSpec(
            backbone="hf", backbone_config=kept, num_slots=0, clip_dim=0, num_classes=len(labels)
        )
        model = build_model(spec, clip)
    except ConfigError as error:
        raise CheckpointError(f"{one_line(folder)}: {error.message}", hint=error.hint) from error
    tensors = {}
    for key, value in _load(transformers, found, folder).state_dict().items():
        target = f"classifier.linear.{key.removeprefix('classifier.')}"
        tensors[target if key.startswith("classifier.") else f"backbone.network.{key}"] = (key, value)
    return Imported(
        model=model,
        clip=clip,
        view_plan=ViewPlan(num_clips=5),
        labels=labels,
        origin={
            "model": f"{found.network} of transformers {transformers.__version__}",
            "published": quoted(config.get("_name_or_path") or "unknown"),
            "file": weights_file.name,
            "sha256": sha256_file(weights_file),
            "frame stride": "as published for this architecture; the configuration does not say",
            "licence": "unknown: see the model's own card",
        },
        tensors=assign_weights(model, tensors, where=one_line(folder)),
        own_preprocess=own,
    )


class _OwnProcessor:
    """The model's own video processor, and the contract that says the same."""

    def __init__(
        self, transformers: Any, found: Architecture, values: Mapping[str, Any], *, where: str
    ) -> None:
        for key in ("size", "image_mean", "image_std"):
            if key not in values:
                raise ConfigError(f"{where}: the key {quoted(key)} is missing")
        self.where = where
        self.offset = found.processor == "VivitVideoProcessor"
        if values.get("offset", self.offset) is not self.offset:
            raise self._unexpressed("offset", values["offset"])
        skipped = ("image_processor_type", "video_processor_type", "processor_class", "auto_map", "offset")
        options = {key: value for key, value in values.items() if key not in skipped}
        try:
            self.processor: Any = getattr(transformers, found.processor)(**options)
        except Exception as error:  # transformers raises what it likes
            raise ConfigError(f"{where}: transformers refuses it ({quoted(str(error))})") from error
        self.pixels = found.pixels

    def contract(self) -> dict[str, Any]:
        """Return the fields of the contract that the processor decides.

        Raises:
            ConfigError: if it does something that the contract does not express; names it.
        """
        own = self.processor
        for key in _UNEXPRESSED:
            if getattr(own, key, None):
                raise self._unexpressed(key, True)
        if not own.do_resize:
            raise self._unexpressed("do_resize", False)
        if int(own.resample) != _BILINEAR:
            raise self._unexpressed("resample", int(own.resample))
        size, crop = dict(own.size), dict(own.crop_size or {})
        exact = (size["height"], size["width"]) if size.get("height") and size.get("width") else None
        short = size.get("shortest_edge")
        if exact is None and (not short or size.get("longest_edge")):
            raise self._unexpressed("size", {key: value for key, value in size.items() if value})
        cropped = (crop.get("height"), crop.get("width")) if own.do_center_crop else exact
        if cropped is None or cropped[0] is None or cropped[0] != cropped[1]:
            raise self._unexpressed("crop_size" if own.do_center_crop else "do_center_crop", cropped)
        factor = own.rescale_factor if own.do_rescale else 1.0
        offset = 1.0 if self.offset and own.do_rescale else 0.0
        mean, std = (own.image_mean, own.image_std) if own.do_normalize else ([0.0] * 3, [1.0] * 3)
        # (x * factor - offset - mean) / std, with values x from 0 to 255, in terms of x / 255.
        return {
            "short_side": 0 if exact else short,
            "exact_size": exact,
            "crop_size": cropped[0],
            "mean": tuple((value + offset) / (255 * factor) for value in mean),
            "std": tuple(value / (255 * factor) for value in std),
        }

    def _unexpressed(self, key: str, value: object) -> ConfigError:
        return ConfigError(
            f"{self.where}: {key} is {quoted(value)}, which the contract does not express",
            hint="it knows a bilinear resize to a short side or a size, a square cut from the middle, mean and std",
        )

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Make normalised float (T, 3, h, w) of uint8 frames (T, H, W, 3)."""
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)
        done = self.processor([video], return_tensors="pt", do_sample_frames=False)
        pixels: torch.Tensor = done[self.pixels][0]
        return pixels.numpy()


def _load(transformers: Any, found: Architecture, folder: Path) -> nn.Module:
    """Let transformers read the safetensors, whose names it may have changed since they were written."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        network, said = getattr(transformers, found.network).from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises what it likes on damaged files
        raise CheckpointError(
            f"the weights in {one_line(folder)} cannot be loaded ({quoted(str(error).splitlines()[0])})",
            hint="a file is cut short or belongs to another model: fetch the folder again",
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(str, said.get(what) or ())):
            raise CheckpointError(
                f"the weights in {one_line(folder)} do not fit its configuration: {what.replace('_', ' ')} "
                f"{', '.join(quoted(name) for name in names[:3])}",
                hint="weights are taken whole or not at all; give the folder as it was published",
            )
    return network  # type: ignore[no-any-return]


def _labels(config: Mapping[str, Any], *, where: str) -> tuple[str, ...]:
    table = config.get("id2label")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{where}: the key 'id2label' is missing", hint="the labels come from there")
    numbers = sorted(table, key=lambda key: (len(str(key)), str(key)))
    labels = [table[number] for number in numbers]
    if numbers != [str(number) for number in range(len(table))] or not all(
        isinstance(label, str) for label in labels
    ):
        raise CheckpointError(f"{where}: 'id2label' does not number labels from 0 on")
    if len(set(labels)) != len(labels):
        raise CheckpointError(f"{where}: two labels of 'id2label' are the same")
    return tuple(labels)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{one_line(path)} cannot be read ({error.strerror})",
            hint="give the folder of a model, as hf:FOLDER",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{one_line(path)} is not readable JSON ({quoted(str(error))})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{one_line(path)} is not a table of settings")
    return values
