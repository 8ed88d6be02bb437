"""What any artifact says about itself, without running it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivdr_deploy.artifacts.bundle import MANIFEST_FILE, open_bundle
from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import ArtifactManifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Of one artifact."""

    kind: str
    """``bundle``, ``checkpoint``, ``ONNX file``, ``TensorRT plan``, ``archive`` or ``score table``."""

    values: dict[str, Any]
    """What it says, as JSON can hold it."""

    next_command: str | None = None


def describe(path: str | Path) -> Description:
    """Read what an artifact says about itself.

    Args:
        path: A bundle, or a file: checkpoint (``.safetensors``), ``.onnx``, ``.engine`` (or its ``.json``
            sidecar), ``.mar`` or ``.parquet``.

    Raises:
        ArtifactError: if it is absent, not one of these, or does not say anything of ours.
        CheckpointError: if a checkpoint is not readable.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist", hint="give a bundle, or a file that ivdr wrote")
    if path.is_dir():
        return _describe_bundle(path)
    readers: dict[str, Callable[[Path], Description]] = {
        ".safetensors": _describe_checkpoint,
        ".onnx": _describe_onnx,
        ".engine": _describe_engine,
        ".json": _describe_json,
        ".mar": _describe_archive,
        ".parquet": _describe_scores,
    }
    if path.suffix not in readers:
        raise ArtifactError(
            f"{path} is no artifact of ivdr",
            hint=f"it shows bundles, and files ending in {', '.join(readers)}",
        )
    return readers[path.suffix](path)


def _describe_bundle(path: Path) -> Description:
    bundle = open_bundle(path)
    return Description(
        kind="bundle",
        values=_manifest_values(bundle.manifest),
        next_command=f"ivdr verify {path} --data test.csv",
    )


def _describe_checkpoint(path: Path) -> Description:
    from ivdr_deploy.artifacts.checkpoint import read_checkpoint_info

    info = read_checkpoint_info(path)
    values = {
        "contract_hash": info.clip.contract_hash,
        "valid_outputs": list(info.training.valid_outputs()),
        **to_dict(info),
    }
    return Description(kind="checkpoint", values=values, next_command=f"ivdr export {path} -o BUNDLE")


def _describe_onnx(path: Path) -> Description:
    import onnx

    from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata

    try:
        proto = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's own error; that package is none of our direct dependencies
        raise ArtifactError(f"{path} is not a readable ONNX file ({error})") from error
    props = {entry.key: entry.value for entry in proto.metadata_props}
    metadata = OnnxMetadata.from_props(props, where=str(path))
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    return Description(
        kind="ONNX file",
        values={**to_dict(metadata), "opsets": opsets},
        next_command=f"ivdr predict {path} video.mp4",
    )


def _describe_engine(path: Path) -> Description:
    from ivdr_deploy.artifacts.sidecar import read_sidecar

    return Description(kind="TensorRT plan", values=to_dict(read_sidecar(path)))


def _describe_json(path: Path) -> Description:
    """A manifest stands for its bundle, a sidecar for its engine."""
    if path.name == MANIFEST_FILE:
        return _describe_bundle(path.parent)
    if path.name.endswith(".engine.json"):
        return _describe_engine(path.with_suffix(""))
    raise ArtifactError(f"{path} is neither a {MANIFEST_FILE} nor the sidecar of an engine")


def _describe_archive(path: Path) -> Description:
    from ivdr_deploy.serving.torchserve.archive import open_archive

    archive = open_archive(path)
    values = {**_manifest_values(archive.manifest), "settings": to_dict(archive.settings)}
    return Description(kind="archive", values=values, next_command=f"ivdr serve {path}")


def _describe_scores(path: Path) -> Description:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ivdr_deploy.scoring.sink import METADATA_KEY

    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{path} is not a readable Parquet file ({error})") from error
    with parquet:
        metadata = (parquet.schema_arrow.metadata or {}).get(METADATA_KEY)
        if metadata is None:
            raise ArtifactError(
                f"{path} carries no metadata of ivdr", hint="`ivdr score` writes tables that do"
            )
        shape = {"rows": parquet.metadata.num_rows, "columns": parquet.schema_arrow.names}
    return Description(kind="score table", values={**shape, **json.loads(metadata)})


def _manifest_values(manifest: ArtifactManifest) -> dict[str, Any]:
    values: dict[str, Any] = to_dict(manifest)
    return {**values, "valid_outputs": list(manifest.training.valid_outputs())}
