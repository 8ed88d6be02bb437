"""The files of a Hugging Face folder: settings in JSON, and safetensors, of which only the beginnings are read here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ivdr_deploy._files import read_bounded
from ivdr_deploy._text import is_plain, one_line, quoted
from ivdr_deploy.artifacts.manifest import MOST_BYTES
from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.records import parse_json

PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

KINDS = ("F64", "F32", "F16", "BF16")
"""Of numbers in safetensors that weights may have."""


def processor_file(folder: Path) -> Path:
    """Return the settings of the preprocessing; of two the one for videos.

    Raises:
        CheckpointError: if there are none.
    """
    found = next((folder / file for file in PROCESSOR_FILES if (folder / file).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{one_line(folder)} holds none of {', '.join(PROCESSOR_FILES)}",
            hint="fetch the folder again, with the settings of its preprocessing",
        )
    return found


def weights_files(folder: Path) -> list[Path]:
    """Return the safetensors of a folder: one file, or all those that an index names.

    Raises:
        CheckpointError: if there are none, or the index does not say which.
    """
    found = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{one_line(folder)} holds none of {', '.join(WEIGHT_FILES)}",
            hint="only safetensors are read: a pytorch_model.bin is a pickle, which can run what it likes",
        )
    if found.suffix != ".json":
        return [found]
    table = read_json(found).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(
        isinstance(name, str) and is_plain(name) and Path(name).name == name for name in names
    ):
        raise CheckpointError(
            f"{one_line(found)} does not say in which files of its folder the weights are",
            hint="fetch the folder again",
        )
    return [folder / name for name in sorted(set(names))]


def shapes_in(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of some safetensors, from what stands at the beginning of each file.

    Raises:
        CheckpointError: if one cannot be read, or holds tensors of anything but plain floating point numbers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as stored:
                for name in sorted(stored.keys()):
                    tensor = stored.get_slice(name)
                    if (kind := tensor.get_dtype()) not in KINDS:
                        raise CheckpointError(
                            f"{one_line(file)} has the tensor {quoted(name)} of {kind}, expected {', '.join(KINDS)}",
                            hint="give the weights as they were trained, not in a compressed form",
                        )
                    shapes[name] = tuple(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{one_line(file)} is not a readable .safetensors file ({quoted(str(error))})",
                hint="it may be cut short: fetch the folder again",
            ) from error
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        CheckpointError: if it cannot be read, or holds something else.
    """
    try:
        values = parse_json(read_bounded(path, MOST_BYTES))
    except OSError as error:
        raise CheckpointError(
            f"{one_line(path)} cannot be read ({error.strerror})",
            hint="give the folder of a model, as hf:FOLDER",
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{one_line(path)} is not readable JSON ({quoted(str(error))})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{one_line(path)} is not a table of settings")
    return values
