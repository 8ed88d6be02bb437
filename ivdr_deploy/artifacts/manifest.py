"""``manifest.json`` of a bundle: what it holds, the variants of its model, and how far each is from the reference.

Standard library only: serving reads it before anything heavy.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ivdr_deploy._files import atomic_path, read_bounded, sha256_file
from ivdr_deploy._text import quoted, quoted_few, reason_of
from ivdr_deploy.artifacts import former
from ivdr_deploy.artifacts.speed import Speed
from ivdr_deploy.artifacts.verification import Verification
from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.records import from_dict, parse_json, require_plain, require_range, to_dict
from ivdr_deploy.spec import (
    FORMAT_VERSION,
    ClipSpec,
    Device,
    ModelSpec,
    Precision,
    Provenance,
    RuntimeName,
    TrainingState,
    ViewPlan,
    canonical_json,
    require_outputs,
)

MANIFEST_FILE = "manifest.json"
DIGEST_KEY = "manifest_sha256"
EXPORT_AGAIN = "copy the bundle again, or make it again with `ivdr export`"

PROVED_ON_KEY = "proved_on"
"""Entry of ``Variant.build``: what it was run on, where that computes in another precision than its own."""

ADD_PLAN = "`ivdr export BUNDLE --engine trt --precision PRECISION`"
"""What adds a plan, or puts another one in its place, and leaves everything else in the bundle as it is."""

MOST_BYTES = 64 << 20
"""Of a manifest, as of any file of settings: the labels of a thousand classes take some 20 KB."""

SHOWN_VARIANTS = 20
"""That a message names: more than any export makes."""

_MOST_VARIANTS = 100
_MOST_AXES = 8
_PATH = 1000
"""Characters of a file's path inside a bundle."""

FileKind = Literal["model", "golden", "sidecar", "document", "record"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a bundle."""

    path: str
    """Relative to the bundle."""

    sha256: str
    size_bytes: int
    kind: FileKind

    def __post_init__(self) -> None:
        require_plain("path of a file", self.path, most=_PATH)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputParity:
    """How far one output of one variant is from the reference over the golden clips."""

    output: str
    max_abs_diff: float
    min_cosine: float
    """Smallest cosine similarity over the golden clips."""

    tolerance: float
    """Largest ``max_abs_diff`` that passes."""

    def __post_init__(self) -> None:
        require_range("difference of an output", self.max_abs_diff)  # infinite where nothing can be compared
        require_range("cosine of an output", self.min_cosine, least=-1.001, most=1.001)  # rounding
        require_range("tolerance of an output", self.tolerance, most=sys.float_info.max)

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.max_abs_diff <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The machines that a variant runs on; an empty field asks for nothing."""

    device: Device | None = None
    """The one kind of device it runs on; None: whichever the runtime has."""

    instruction_set: str = ""
    """Of a CPU, e.g. ``vnni``; a name of ``environment.instruction_sets``."""

    compute_capabilities: tuple[str, ...] = ()
    """Of a GPU, e.g. ``("8.6", "8.9")``."""

    threads: int | None = None
    """The number of threads it was compiled for."""

    def __post_init__(self) -> None:
        require_plain("instruction set", *filter(None, [self.instruction_set]))
        require_plain("compute capability", *self.compute_capabilities)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run the model of a bundle."""

    id: str
    """Readable and unique within the bundle: ``onnx-fp32``, ``trt-fp16-sm89``."""

    runtime: RuntimeName
    precision: Precision
    provider: str = ""
    """Which of a runtime's libraries runs it, where it has several: ``tensorrt`` or ``tensorrt_rtx``."""

    target: Target = field(default_factory=Target)
    files: tuple[str, ...]
    """Paths relative to the bundle; the first is the one to open."""

    derived_from: str | None = None
    """Id of the variant it was made from; None: it is the reference that the others are held against."""

    parity: tuple[OutputParity, ...] = ()
    """Against the reference, on the golden clips; empty for the reference itself, and where it was never run."""

    build: dict[str, str] = field(default_factory=dict)
    """How it was made, where that is not plain from the rest: calibration, versions, settings."""

    verification: Verification | None = None
    """What `ivdr verify` found over videos; None where it never judged these files."""

    speed: Speed | None = None
    """What `ivdr bench --speeds` measured last, on which machine; None where it never timed these files."""

    def __post_init__(self) -> None:
        origin = [] if self.derived_from is None else [self.derived_from]
        require_plain("id of a variant", self.id, *origin)
        require_plain("provider", *filter(None, [self.provider]))

    @property
    def verified(self) -> bool:
        """Whether it may be chosen by default: nothing speaks against it, and something speaks for it.

        The verdict over videos where there is one. Before that a variant is verified by its golden clips, and the
        reference by being the reference.
        """
        return not self.unverified_reason

    @property
    def unverified_reason(self) -> str:
        """Why it is not verified; empty when it is."""
        if self.verification is not None and not self.verification.passed:
            return f"its verification says {self.verification}"
        if not all(entry.passed for entry in self.parity):
            return "not verified, since it does not agree with the reference on the golden clips"
        if self.derived_from is not None and not self.parity and self.verification is None:
            return "not verified, since it was not run where it was built"
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """One named output of the network."""

    name: str
    shape: tuple[int, ...]
    """Without the batch axis."""

    def __post_init__(self) -> None:
        if len(self.shape) > _MOST_AXES or not all(1 <= axis < 1 << 31 for axis in self.shape):
            raise ConfigError(
                f"the shape of an output is {quoted(self.shape)}, expected at most {_MOST_AXES} sizes of 1 or more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactManifest:
    """``manifest.json`` of a bundle."""

    format_version: int = FORMAT_VERSION
    name: str
    version: str
    clip: ClipSpec
    contract_hash: str
    view_plan: ViewPlan
    """Clips of a video that are looked at unless somebody asks for others."""

    model: ModelSpec | None = None
    """How to build the network; None for a model that only exists as exported files."""

    labels: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    training: TrainingState | None = None
    """How far each head was trained; None for an imported model, whose outputs are all valid."""

    variants: tuple[Variant, ...]
    files: tuple[FileEntry, ...]
    provenance: Provenance = field(default_factory=Provenance)
    ivdr_version: str
    """Version of ivdr_deploy that wrote the bundle."""

    def __post_init__(self) -> None:
        require_plain("name", self.name)
        require_plain("version", self.version, self.ivdr_version)
        require_outputs(self.output_names)
        if self.contract_hash != self.clip.contract_hash:
            raise ConfigError(
                f"the contract hash {self.contract_hash[:12]} is not that of the contract "
                f"({self.clip.contract_hash[:12]})",
                hint="the manifest was edited by hand; export the bundle again",
            )
        ids = [variant.id for variant in self.variants]
        if len(ids) > _MOST_VARIANTS:
            raise ConfigError(f"there are {len(ids)} variants, expected at most {_MOST_VARIANTS}")
        if len(set(ids)) != len(ids):
            raise ConfigError(f"two variants have the same id; found {quoted_few(ids)}")
        if len(first := [variant.id for variant in self.variants if variant.derived_from is None]) > 1:
            raise ConfigError(f"there is one reference, and {quoted_few(first)} all claim to be it")
        if empty := [variant.id for variant in self.variants if not variant.files]:
            raise ConfigError(f"the variant {quoted(empty[0])} has no files")
        absent = {name for variant in self.variants for name in variant.files} - {
            entry.path for entry in self.files
        }
        if absent:
            raise ConfigError(f"a variant names files that are not listed: {quoted_few(sorted(absent))}")
        for variant in self.variants:
            recorded = variant.verification
            if recorded is not None and recorded.variant_sha256 != self.variant_sha256(variant):
                raise ConfigError(
                    f"the verification of {quoted(variant.id)} belongs to other files than it has",
                    hint="the manifest was edited by hand; export the bundle again, then `ivdr verify` it",
                )
            if variant.speed is not None and variant.speed.variant_sha256 != self.variant_sha256(variant):
                raise ConfigError(
                    f"the speed of {quoted(variant.id)} belongs to other files than it has",
                    hint="the manifest was edited by hand; export the bundle again, then `ivdr bench` it",
                )
        for output in self.outputs:
            if output.name == "logits" and output.shape not in ((), (len(self.labels),)):
                raise ConfigError(f"{len(self.labels)} labels for logits of shape {quoted(output.shape)}")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(output.name for output in self.outputs)

    @property
    def stale_outputs(self) -> tuple[str, ...]:
        """Names of the outputs whose head was not trained together with this backbone."""
        valid = self.output_names if self.training is None else self.training.valid_outputs()
        return tuple(name for name in self.output_names if name not in valid)

    @property
    def reference(self) -> Variant | None:
        """The variant that the others are held against; None where the bundle does not hold it."""
        return next((variant for variant in self.variants if variant.derived_from is None), None)

    def entry(self, path: str) -> FileEntry:
        """Return what the manifest says about a file."""
        return next(entry for entry in self.files if entry.path == path)

    def variant_sha256(self, variant: Variant) -> str:
        """Return one digest over the names and contents of a variant's files."""
        files = {name: self.entry(name).sha256 for name in variant.files}
        return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def labels_sha256(labels: Sequence[str]) -> str:
    """Return a digest of labels in their order, for files that cannot hold the labels themselves."""
    return hashlib.sha256(canonical_json(list(labels)).encode()).hexdigest()


def file_entry(folder: Path, name: str, *, kind: FileKind) -> FileEntry:
    """Describe a file that has just been written into a bundle's folder."""
    path = folder / name
    return FileEntry(path=name, sha256=sha256_file(path), size_bytes=path.stat().st_size, kind=kind)


def write_manifest(folder: Path, manifest: ArtifactManifest) -> None:
    """Write ``manifest.json``, with a digest of its own content."""
    values = to_dict(manifest)
    values = {DIGEST_KEY: _digest(values), **values}
    with atomic_path(folder / MANIFEST_FILE) as temporary:
        temporary.write_text(
            json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def load_manifest(path: Path) -> ArtifactManifest:
    """Read a ``manifest.json``; see ``read_manifest``.

    Raises:
        ArtifactError: as ``read_manifest``, and if the file is too large to be one.
        OSError: if it cannot be read.
    """
    try:
        content = read_bounded(path, MOST_BYTES)
    except ValueError as error:
        raise ArtifactError(f"{path} is not the manifest of a bundle: {error}", hint=EXPORT_AGAIN) from error
    return read_manifest(content, where=str(path))


def read_manifest(content: str | bytes, *, where: str) -> ArtifactManifest:
    """Parse and check the text of a ``manifest.json``, of this format or a former one.

    Args:
        content: The text.
        where: Name of the file, for error messages.

    Raises:
        ArtifactError: if it is not JSON, nested without end, of a later format version, changed since it was written,
            or incomplete.
    """
    try:
        values = parse_json(content)
        if not isinstance(values, dict) or "format_version" not in values:
            raise ArtifactError(f"{where} is not the manifest of a bundle", hint=EXPORT_AGAIN)
        version = former.check_version(values["format_version"], where=where, error=ArtifactError)
        if values.pop(DIGEST_KEY, None) != _digest(values):
            raise ArtifactError(f"{where} was changed after it was written", hint=EXPORT_AGAIN)
        if version == 1:
            values = former.upgrade_manifest(values, where=where)
        manifest = from_dict(ArtifactManifest, values, where=where)
        if any(output.name == "logits" and not output.shape for output in manifest.outputs):
            raise ConfigError(f"{where}: the logits have no shape to hold the labels against")
        return manifest
    except ConfigError as error:
        raise ArtifactError(error.message, hint=error.hint or EXPORT_AGAIN) from error
    except ValueError as error:  # no JSON, or with a text or a number that cannot be written back
        raise ArtifactError(
            f"{where} is not readable JSON ({reason_of(error)})", hint=EXPORT_AGAIN
        ) from error


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()
