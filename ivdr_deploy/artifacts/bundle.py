"""The bundle: a folder with the exported models of one network, their contract, and proof that they agree.

``manifest.json`` lists every file with its size and digest, and carries a digest of itself, so that a bundle
is either exactly what ``ivdr export`` wrote or refused. Standard library and numpy only: serving reads it
before anything heavy.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ivdr_deploy._files import atomic_path, sha256_file
from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.records import from_dict, to_dict
from ivdr_deploy.spec import (
    FORMAT_VERSION,
    ArtifactManifest,
    FileEntry,
    Precision,
    RuntimeName,
    canonical_json,
)

MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.npz"
MODEL_CARD_FILE = "MODEL_CARD.md"

_DIGEST_KEY = "manifest_sha256"
_EXPORT_AGAIN = "copy the bundle again, or make it again with `ivdr export`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle whose files have all been checked; see ``open_bundle``."""

    path: Path
    manifest: ArtifactManifest

    def golden(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read the golden clips.

        Returns:
            Clips, uint8 (G, T, H, W, 3), and for every output of the manifest what torch gave for them,
            float32 with first axis G.

        Raises:
            ArtifactError: if the file does not hold exactly that.
        """
        path = self.path / GOLDEN_FILE
        try:
            with np.load(path, allow_pickle=False) as arrays:
                golden = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path} cannot be read ({error})", hint=_EXPORT_AGAIN) from error
        expected = {"video", *self.manifest.output_names}
        if set(golden) != expected:
            raise ArtifactError(
                f"{path} holds {sorted(golden)}, expected {sorted(expected)}", hint=_EXPORT_AGAIN
            )
        return golden.pop("video"), golden

    def model_entry(self, runtime: RuntimeName, precision: Precision = "fp32") -> FileEntry:
        """Find the manifest's entry of the model that ``runtime`` executes.

        Raises:
            ArtifactError: if the bundle holds none; names those it holds.
        """
        models = [entry for entry in self.manifest.files if entry.kind == "model"]
        for entry in models:
            if (entry.runtime, entry.precision) == (runtime, precision):
                return entry
        held = ", ".join(f"{entry.runtime} {entry.precision}" for entry in models)
        hint = "make the plan with `ivdr export CHECKPOINT -o BUNDLE --trt`" if runtime == "tensorrt" else ""
        raise ArtifactError(
            f"{self.path} holds no {precision} model for {runtime}; it holds: {held or 'none'}", hint=hint
        )

    def model_file(self, runtime: RuntimeName, precision: Precision = "fp32") -> Path:
        """Return the path of the model that ``runtime`` executes; ``ArtifactError`` if there is none."""
        return self.path / self.model_entry(runtime, precision).path

    def copy_serving_files(
        self, dest: str | Path, *, runtime: RuntimeName, precision: Precision = "fp32"
    ) -> Bundle:
        """Copy what serving with one runtime needs into an existing folder, as a bundle of its own.

        Args:
            dest: An existing folder; files of the same name are replaced.
            runtime: The one runtime that will serve.
            precision: Of its model.

        Returns:
            The smaller bundle: that model (with its sidecar), the golden clips and the model card. Other
            models of this bundle are left out, so its manifest lists fewer files; everything else in it is
            the same.

        Raises:
            ArtifactError: if there is no such model.
        """
        dest = Path(dest)
        model = self.model_entry(runtime, precision)
        kept = tuple(
            entry
            for entry in self.manifest.files
            if entry == model
            or entry.kind in ("golden", "document")
            or (entry.kind == "sidecar" and entry.path == f"{model.path}.json")
        )
        for entry in kept:
            shutil.copyfile(self.path / entry.path, dest / entry.path)
        manifest = replace(self.manifest, files=kept)
        write_manifest(dest, manifest)
        return Bundle(path=dest, manifest=manifest)


def file_entry(
    folder: Path,
    name: str,
    *,
    kind: str,
    runtime: RuntimeName | None = None,
    precision: Precision | None = None,
) -> FileEntry:
    """Describe a file that has just been written into a bundle's folder."""
    path = folder / name
    values = {"path": name, "sha256": sha256_file(path), "size_bytes": path.stat().st_size, "kind": kind}
    return from_dict(FileEntry, {**values, "runtime": runtime, "precision": precision}, where=name)


def write_golden(folder: Path, video: np.ndarray, expected: Mapping[str, np.ndarray]) -> None:
    """Write the golden clips and what torch gives for them."""
    np.savez_compressed(folder / GOLDEN_FILE, video=video, **dict(expected))  # type: ignore[arg-type]


def write_manifest(folder: Path, manifest: ArtifactManifest) -> None:
    """Write ``manifest.json``, with a digest of its own content."""
    values = to_dict(manifest)
    values = {_DIGEST_KEY: _digest(values), **values}
    with atomic_path(folder / MANIFEST_FILE) as temporary:
        temporary.write_text(
            json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def read_manifest(content: str | bytes, *, where: str) -> ArtifactManifest:
    """Parse and check the text of a ``manifest.json``.

    Args:
        content: The text.
        where: Name of the file, for error messages.

    Raises:
        ArtifactError: if it is not JSON, of another format version, changed since it was written, or
            incomplete.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"{where} is not readable JSON ({error})", hint=_EXPORT_AGAIN) from error
    if not isinstance(values, dict) or "format_version" not in values:
        raise ArtifactError(f"{where} is not the manifest of a bundle", hint=_EXPORT_AGAIN)
    if values["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{where} has format version {values['format_version']!r}, this ivdr reads {FORMAT_VERSION}",
            hint="use the ivdr_deploy that wrote the bundle, or make it again with `ivdr export`",
        )
    if values.pop(_DIGEST_KEY, None) != _digest(values):
        raise ArtifactError(f"{where} was changed after it was written", hint=_EXPORT_AGAIN)
    try:
        return from_dict(ArtifactManifest, values, where=where)
    except ConfigError as error:
        raise ArtifactError(error.message, hint=error.hint or _EXPORT_AGAIN) from error


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check every file it lists; files that it does not list are ignored.

    Raises:
        ArtifactError: if ``path`` is no bundle, or a file is missing, cut short or changed; names the file.
    """
    path = Path(path)
    source = path / MANIFEST_FILE
    if not source.is_file():
        what = (
            "a folder without manifest.json"
            if path.is_dir()
            else "not a folder"
            if path.exists()
            else "absent"
        )
        raise ArtifactError(
            f"{path} is not a bundle: it is {what}", hint="`ivdr export CHECKPOINT -o BUNDLE` makes one"
        )
    manifest = read_manifest(source.read_bytes(), where=str(source))
    for entry in manifest.files:
        _check_file(path, entry)
    return Bundle(path=path, manifest=manifest)


def stale_outputs(manifest: ArtifactManifest) -> Sequence[str]:
    """Name the outputs whose head was not trained together with this backbone."""
    valid = manifest.training.valid_outputs()
    return [name for name in manifest.output_names if name not in valid]


def _check_file(folder: Path, entry: FileEntry) -> None:
    relative = PurePosixPath(entry.path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ArtifactError(f"{folder / MANIFEST_FILE} lists {entry.path!r}, which lies outside the bundle")
    path = folder / relative
    if not path.is_file():
        raise ArtifactError(f"{path} is listed in the manifest, but missing", hint=_EXPORT_AGAIN)
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise ArtifactError(
            f"{path} has {size} bytes, the manifest says {entry.size_bytes}", hint=_EXPORT_AGAIN
        )
    digest = sha256_file(path)
    if digest != entry.sha256:
        raise ArtifactError(
            f"{path} was changed: its SHA-256 begins {digest[:12]}, the manifest says {entry.sha256[:12]}",
            hint=_EXPORT_AGAIN,
        )


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()
