"""What any artifact says about itself, without running it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivdr_deploy._text import QUOTED, cut, few, reason_of
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE, Kind, identify
from ivdr_deploy.artifacts.manifest import ArtifactManifest
from ivdr_deploy.artifacts.verification import describe_figures
from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import ClipSpec, Provenance, TrainingState, ViewPlan

_SHOWN = 30
"""Names of a foreign file that a row shows; --json has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Of one artifact."""

    kind: Kind
    values: dict[str, Any]
    """All that it says, as JSON can hold it."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """What a person wants to know first, as names and texts."""

    next_command: tuple[str | Path, ...] = ()
    """The words of what to run next, if there is such a thing."""


def describe(path: str | Path) -> Description:
    """Read what an artifact says about itself.

    Raises:
        ArtifactError: if it is absent, no artifact of ours, does not say anything of ours, or holds a number that JSON
            does not have.
        CheckpointError: if a checkpoint is not readable.
    """
    kind, path = identify(path)
    readers: dict[Kind, Callable[[Path], Description]] = {
        Kind.BUNDLE: _bundle,
        Kind.CHECKPOINT: _checkpoint,
        Kind.ONNX: _onnx,
        Kind.ENGINE: _engine,
        Kind.ARCHIVE: _archive,
        Kind.SCORES: _scores,
        Kind.SHARD: _shard,
    }
    found = readers[kind](path)
    try:
        json.dumps(found.values, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} holds what JSON does not have ({reason_of(error)})") from error
    return found


def _bundle(path: Path) -> Description:
    bundle = open_bundle(path)
    return Description(
        kind=Kind.BUNDLE,
        values=_manifest_values(bundle.manifest),
        rows=_manifest_rows(bundle.manifest),
        next_command=("ivdr", "verify", path, "--videos", "test.csv"),
    )


def _checkpoint(path: Path) -> Description:
    from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info

    info = read_checkpoint_info(path)
    outputs = info.training.valid_outputs()
    values = {"contract_hash": info.clip.contract_hash, "valid_outputs": list(outputs), **to_dict(info)}
    rows = [
        ("backbone", info.model.backbone),
        *_contract_rows(info.clip, info.view_plan),
        ("outputs", ", ".join(outputs)),
        *_label_rows(info.labels),
        *_training_rows(info.training),
        *_provenance_rows(info.provenance),
    ]
    following = ("ivdr", "export", path, "-o", "BUNDLE")
    return Description(kind=Kind.CHECKPOINT, values=values, rows=rows, next_command=following)


def _onnx(path: Path) -> Description:
    from ivdr_deploy.runtimes.loading import UNPROVED
    from ivdr_deploy.runtimes.registry import load_runtime

    load_runtime("onnxruntime")
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    with OrtRuntime(path) as runtime:
        metadata = runtime.metadata
    rows = [
        ("model", f"{metadata.name} {metadata.version}"),
        ("precision", metadata.precision or "not said"),
        *_contract_rows(metadata.contract, metadata.view_plan),
        ("outputs", ", ".join(metadata.outputs)),
        *_label_rows(metadata.labels),
        ("proof", f"none: {UNPROVED}"),
        ("written by", f"ivdr_deploy {metadata.ivdr_version}"),
    ]
    following = ("ivdr", "predict", path, "video.mp4")
    values = {**to_dict(metadata), "proof": None}
    return Description(kind=Kind.ONNX, values=values, rows=rows, next_command=following)


def _engine(path: Path) -> Description:
    from ivdr_deploy.artifacts.sidecar import read_sidecar

    info = read_sidecar(path)
    rows = [
        ("built by", f"{info.provider} {info.provider_version} in {info.build_seconds:g} s"),
        ("for GPUs of", ", ".join(info.compute_capabilities)),
        ("precision", info.precision),
        ("batch", f"{info.batch.min} to {info.batch.max} clips, tuned for {info.batch.opt}"),
        ("outputs", ", ".join(info.outputs)),
        ("contract", info.contract_hash),
        ("ONNX file", info.onnx_sha256),
    ]
    return Description(kind=Kind.ENGINE, values=to_dict(info), rows=rows)


def _archive(path: Path) -> Description:
    from ivdr_deploy.serving.torchserve.archive import open_archive

    archive = open_archive(path)
    settings = to_dict(archive.settings)
    plain = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    rows = [
        *_manifest_rows(archive.manifest),
        ("server", ", ".join(f"{name} {value}" for name, value in plain.items())),
    ]
    values = {**_manifest_values(archive.manifest), "settings": settings}
    following = ("ivdr", "serve", path)
    return Description(kind=Kind.ARCHIVE, values=values, rows=rows, next_command=following)


def _scores(path: Path) -> Description:
    from ivdr_deploy.scoring.reader import read_present

    found = read_present(path, columns=["error_code"])
    ledger, plan = found.ledger, found.ledger.plan
    counts = Counter("ok" if code is None else code for code in found.rows["error_code"].to_pylist())
    failed = {code: count for code, count in counts.most_common() if code != "ok"}
    rows = [
        ("state", found.state),
        ("videos", f"{counts['ok']} ok, {sum(failed.values())} failed"),
        *([("failed", _counts(failed))] if failed else []),
        ("model", f"{plan.model} {plan.model_version}, {plan.variant}"),
        ("ran on", plan.runtime),
        ("clips", str(plan.view_plan)),
        ("contract", plan.contract_hash),
        ("run", f"{ledger.run_id}, started {ledger.started_at}"),
    ]
    values = {
        **to_dict(ledger),
        "rows": found.rows.num_rows,
        "listed": found.listed,
        "outcomes": dict(counts),
    }
    return Description(kind=Kind.SCORES, values=values, rows=rows)


def _shard(path: Path) -> Description:
    from ivdr_deploy._optional import import_pyarrow
    from ivdr_deploy.scoring.shard import METADATA_KEY

    pq = import_pyarrow().parquet

    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as parquet:  # scores:1 is no URI
            metadata = (parquet.schema_arrow.metadata or {}).get(METADATA_KEY)
            shape = {"rows": parquet.metadata.num_rows, "columns": parquet.schema_arrow.names}
        values = None if metadata is None else {**shape, **json.loads(metadata)}
    except Exception as error:  # a damaged file makes the reader raise whatever it meets
        raise ArtifactError(
            f"{path} is not a readable Parquet file ({reason_of(error, most=100)})"
        ) from error
    if values is None:
        raise ArtifactError(f"{path} carries no metadata of ivdr", hint="`ivdr score` writes tables that do")
    rows = [
        ("rows", str(shape["rows"])),
        ("columns", _names(shape["columns"])),
        ("run", cut(str(values.get("run_id")), QUOTED)),
        ("table", f"the folder with {SCORE_LEDGER_FILE}: {path.parent}"),
    ]
    return Description(kind=Kind.SHARD, values=values, rows=rows)


def _manifest_values(manifest: ArtifactManifest) -> dict[str, Any]:
    return {**to_dict(manifest), "stale_outputs": list(manifest.stale_outputs)}


def _manifest_rows(manifest: ArtifactManifest) -> list[tuple[str, str]]:
    rows = [
        ("model", f"{manifest.name} {manifest.version}"),
        *([("backbone", manifest.model.backbone)] if manifest.model else []),
        *_contract_rows(manifest.clip, manifest.view_plan),
    ]
    for output in manifest.outputs:
        stale = ", stale: its head was not trained with this backbone" * (
            output.name in manifest.stale_outputs
        )
        rows.append((f"output {output.name}", f"[N, {', '.join(map(str, output.shape))}]{stale}"))
    rows += _label_rows(manifest.labels)
    for variant in manifest.variants:
        if not variant.verified:
            state = f"never taken unless asked for: {variant.unverified_reason}"
        elif variant.derived_from is None:
            state = "the reference"
        elif variant.parity:
            largest = max(entry.max_abs_diff for entry in variant.parity)
            state = f"verified: golden clips within {largest:.1e}"
        else:
            state = "verified"
        size = sum(manifest.entry(name).size_bytes for name in variant.files) / 1e6
        rows.append((f"variant {variant.id}", f"{size:.1f} MB, {state}"))
        if found := variant.verification:
            figures = "; ".join(f"{name} {text}" for name, text in describe_figures(found.figures))
            rows.append((f"measured {variant.id}", f"{found} ({found.measured_at}): {figures}"))
        if speed := variant.speed:
            rows.append((f"speed {variant.id}", f"{speed} ({speed.measured_at})"))
    return [*rows, *_training_rows(manifest.training), *_provenance_rows(manifest.provenance)]


def describe_clip(clip: ClipSpec) -> str:
    """Say in words what one clip is."""
    size = (
        f"{clip.exact_size[0]}x{clip.exact_size[1]}" if clip.exact_size else f"short side {clip.short_side}"
    )
    rate = f"at {clip.target_fps:g} frames/s" if clip.target_fps else "of the video's own rate"
    return f"{clip.num_frames} frames, every {clip.frame_stride} {rate}; {size}, crop {clip.crop_size}"


def _contract_rows(clip: ClipSpec, plan: ViewPlan) -> list[tuple[str, str]]:
    return [("contract", clip.contract_hash), ("one clip", describe_clip(clip)), ("clips", str(plan))]


def _label_rows(labels: tuple[str, ...]) -> list[tuple[str, str]]:
    if not labels:
        return [("labels", "none: it has no classifier")]
    more = f", ... ({len(labels)})" if len(labels) > 12 else ""
    return [("labels", _names(labels[:12]) + more)]


def _counts(counts: dict[str, int]) -> str:
    return _names([f"{cut(name, QUOTED)} {count}" for name, count in counts.items()])


def _names(names: Sequence[str]) -> str:
    """Join names from a foreign file, which may be of any number and length."""
    return few([cut(name, 2 * QUOTED) for name in names[:_SHOWN]] + [*names[_SHOWN:]], most=_SHOWN)


def _training_rows(training: TrainingState | None) -> list[tuple[str, str]]:
    if training is None:
        return [("training", "imported")]
    heads = ", ".join(
        f"{head} {'valid' if training.is_valid(head) else f'stale since step {step}'}"
        for head, step in training.head_steps.items()
    )
    return [("training", f"{training.backbone_step} steps; {heads or 'no heads trained'}")]


def _provenance_rows(provenance: Provenance) -> list[tuple[str, str]]:
    rows = [("made", provenance.created_at or "unknown"), ("code", provenance.git_revision or "unknown")]
    if provenance.origin:
        rows.append(("origin", "; ".join(f"{what}: {text}" for what, text in provenance.origin.items())))
    measured = [f"{name} {value:.4g}" for name, value in provenance.metrics.items() if "accuracy" in name]
    if measured:
        rows.append(("measured", ", ".join(measured)))
    return rows
