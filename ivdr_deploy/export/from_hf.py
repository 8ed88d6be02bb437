"""Video classifiers of Hugging Face from a local folder: its configurations and safetensors, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ivdr_deploy._files import at_home, sha256_file
from ivdr_deploy._optional import require
from ivdr_deploy._text import one_line, quoted, quoted_few, reason_of
from ivdr_deploy.errors import CheckpointError, ConfigError
from ivdr_deploy.export.hf_files import processor_file, read_json, shapes_in, weights_files
from ivdr_deploy.export.importing import Imported, assign_weights
from ivdr_deploy.models.hf import Architecture, architecture, describe
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec, ViewPlan

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"

_LABEL_KEYS = ("id2label", "label2id", "num_labels")
_LABEL_LENGTH = 300
_MAX_CLIP_BYTES = 128 << 20
_LARGEST_SIZE = 8192
"""That a configuration may ask for of anything, however short the tensors are."""

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
    folder = Path(at_home(name))  # no shell does it behind a colon
    config = read_json(folder / CONFIG_FILE)
    _require_plain(folder, config)
    processor, files = processor_file(folder), weights_files(folder)
    labels = _labels(config, where=one_line(folder / CONFIG_FILE))
    kept = {
        key: value for key, value in config.items() if key not in (*_LABEL_KEYS, "auto_map", "architectures")
    }
    try:
        found, shape = architecture(kept), describe(kept)
        stride = max(1, found.span // shape.num_frames)
        own = _OwnProcessor(transformers, found, read_json(processor), where=one_line(processor))
        clip = ClipSpec(num_frames=shape.num_frames, frame_stride=stride, **own.contract())
        if clip.crop_size != shape.size:
            raise ConfigError(
                f"the preprocessor gives {clip.crop_size} pixels, the network takes {shape.size}"
            )
        spec = ModelSpec(
            backbone="hf", backbone_config=kept, num_slots=0, clip_dim=0, num_classes=len(labels)
        )
        _require_the_size(spec, clip, shapes_in(files))
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
            "file": ", ".join(one_line(file.name) for file in files),
            "sha256": ", ".join(map(sha256_file, files)),
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
            ConfigError: if it does something that the contract does not express, or a value is of no use; names it.
        """
        own = self.processor
        for key in _UNEXPRESSED:
            if getattr(own, key, None):
                raise self._unexpressed(key, True)
        if not own.do_resize:
            raise self._unexpressed("do_resize", False)
        if own.resample != _BILINEAR:
            raise self._unexpressed("resample", getattr(own.resample, "value", own.resample))
        size, crop = self._pixels("size"), self._pixels("crop_size")
        exact = (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None
        short = size.get("shortest_edge")
        if exact is None and (not short or size.get("longest_edge")):
            raise self._unexpressed("size", {key: value for key, value in size.items() if value})
        cropped = (crop.get("height"), crop.get("width")) if own.do_center_crop else exact
        if cropped is None or cropped[0] is None or cropped[0] != cropped[1]:
            raise self._unexpressed("crop_size" if own.do_center_crop else "do_center_crop", cropped)
        (factor,) = self._numbers("rescale_factor", 1) if own.do_rescale else (1.0,)
        if factor <= 0:
            raise self._useless("rescale_factor", factor, "a positive number")
        offset = 1.0 if self.offset and own.do_rescale else 0.0
        mean = self._numbers("image_mean", 3) if own.do_normalize else [0.0] * 3
        std = self._numbers("image_std", 3) if own.do_normalize else [1.0] * 3
        # (x * factor - offset - mean) / std, with values x from 0 to 255, in terms of x / 255.
        return {
            "short_side": 0 if exact else short,
            "exact_size": exact,
            "crop_size": cropped[0],
            "mean": tuple((value + offset) / (255 * factor) for value in mean),
            "std": tuple(value / (255 * factor) for value in std),
        }

    def _pixels(self, key: str) -> dict[str, int]:
        """Return the sizes that a key of the processor gives, by name."""
        value = getattr(self.processor, key, None)
        sizes = dict(value or {})
        if not all(type(pixels) is int and pixels >= 1 for pixels in sizes.values()):
            raise self._useless(key, sizes, "positive whole numbers of pixels")
        return sizes

    def _numbers(self, key: str, count: int) -> list[float]:
        """Return so many numbers of a key of the processor, which may give one for all of them."""
        value = getattr(self.processor, key, None)
        given = list(value) if isinstance(value, list | tuple) else [value] * count
        numbers = [float(one) for one in given if isinstance(one, int | float) and math.isfinite(one)]
        if len(numbers) != count or len(given) != count:
            raise self._useless(key, value, f"{count} finite number{'s' * (count > 1)}")
        return numbers

    def _useless(self, key: str, value: object, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} is {quoted(value)}, expected {expected}")

    def _unexpressed(self, key: str, value: object) -> ConfigError:
        return ConfigError(
            f"{self.where}: {key} is {quoted(value)}, which the contract does not express",
            hint="it knows a bilinear resize to a short side or a size, a square cut from the middle, mean and std",
        )

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Make normalised float (T, 3, h, w) of uint8 frames (T, H, W, 3).

        Raises:
            CheckpointError: if the processor cannot do it here.
        """
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)
        try:
            done = self.processor([video], return_tensors="pt", do_sample_frames=False)
            pixels: torch.Tensor = done[self.pixels][0]
            return pixels.numpy()
        except Exception as error:  # transformers raises what it likes, as where it was built
            raise CheckpointError(
                f"{self.where}: the model's own preprocessing fails ({quoted(reason_of(error))})",
                hint="a setting in that file asks for what this machine, or transformers, does not have: take it out",
            ) from error


def _require_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what would have transformers load something else than the weights of the folder, or fetch and run code.

    Raises:
        CheckpointError: if a key of the configuration, or a file beside it, asks for that; names it.
    """
    where = one_line(folder / CONFIG_FILE)
    for key in ("quantization_config", "transformers_weights"):
        if config.get(key) is not None:
            raise CheckpointError(
                f"{where}: {key} is {quoted(config[key])}, expected none",
                hint="only weights as they were trained are read, from model.safetensors",
            )
    for key in ("attn_implementation", "_attn_implementation"):
        if config.get(key) not in (None, "eager", "sdpa"):
            raise CheckpointError(
                f"{where}: {key} is {quoted(config[key])}, expected 'eager' or 'sdpa'",
                hint="take the key out: attention that comes from elsewhere is not run",
            )
    if (folder / ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{one_line(folder)} holds an {ADAPTER_FILE}", hint="merge the adapter into the weights first"
        )


def _require_the_size(spec: ModelSpec, clip: ClipSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration that asks for more than the weights fill, before it takes the memory, or hours.

    Raises:
        ConfigError: if it does.
    """
    if math.prod(clip.clip_shape) > _MAX_CLIP_BYTES:
        raise ConfigError(
            f"a clip of {clip.num_frames} frames of {clip.crop_size} pixels a side is too large"
        )
    longest = max((_LARGEST_SIZE, *(axis for shape in shapes.values() for axis in shape)))
    for key, value in spec.backbone_config.items():
        most = len(shapes) if key.endswith("layers") else longest
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and size > most:
                raise ConfigError(
                    f"the configuration has {quoted(size)} for {quoted(key)}, and the weights are of {len(shapes)} "
                    f"tensors, none longer than {longest}"
                )
    with torch.device("meta"):  # takes no memory
        wanted = sum(value.numel() for value in build_model(spec, clip).parameters())
    held = sum(map(math.prod, shapes.values()))
    if wanted > 2 * held:
        raise ConfigError(
            f"the configuration describes a network of {wanted:,} numbers, the weights hold {held:,}",
            hint="give config.json and weights as they were published together",
        )


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
            f"the weights in {one_line(folder)} cannot be loaded ({quoted(reason_of(error))})",
            hint="a file is cut short or belongs to another model: fetch the folder again",
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(str, said.get(what) or ())):
            raise CheckpointError(
                f"the weights in {one_line(folder)} do not fit its configuration: {what.replace('_', ' ')} "
                f"{quoted_few(names, most=3)}",
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
    for label in labels:
        if not label.strip() or len(label) > _LABEL_LENGTH or one_line(label) != label:
            raise CheckpointError(
                f"{where}: 'id2label' has the label {quoted(label)}",
                hint=f"a label is one line of text, of at most {_LABEL_LENGTH} characters",
            )
    return tuple(labels)
