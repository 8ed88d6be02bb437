"""Whatever is in a file, its reader gives what it promises or an error of ours: nothing else, and no endless memory."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TINY_CLIP, make_tiny_checkpoint
from damage import damaged_bytes, damaged_json, dumped
from safetensors.torch import load_file, save_file

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, read_checkpoint_info
from ivdr_deploy.artifacts.golden import read_golden
from ivdr_deploy.artifacts.manifest import ArtifactManifest, read_manifest
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.artifacts.sidecar import BatchProfile, EngineInfo, read_sidecar, sidecar_path, write_sidecar
from ivdr_deploy.errors import ArtifactError, CheckpointError, IvdrError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import canonical_json

SEEDS = range(200)


def refused(read: Callable[[], object], *expected: type[IvdrError]) -> bool:
    """Read; True when it is refused as expected. Any other exception fails the test."""
    try:
        read()
    except expected as error:
        message = str(error)
    else:
        return False
    assert len(message) < 2000
    return True


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.safetensors")


def test_checkpoint_with_damaged_bytes(checkpoint: Path, tmp_path: Path) -> None:
    data, path = checkpoint.read_bytes(), tmp_path / "a.safetensors"
    header = 8 + int.from_bytes(data[:8], "little")
    count = 0
    for seed in SEEDS:
        path.write_bytes(damaged_bytes(data, seed, within=header))
        count += refused(lambda: load_checkpoint(path), CheckpointError)
    assert count > 0.5 * len(SEEDS)


def describe(checkpoint: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the checkpoint with another description."""
    data = checkpoint.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["ivdr"] = dumped(change(json.loads(header["__metadata__"]["ivdr"])))
    packed = json.dumps(header).encode()
    path.write_bytes(len(packed).to_bytes(8, "little") + packed + data[8 + size :])


def test_checkpoint_with_a_damaged_description(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    count = 0
    for seed in SEEDS:
        describe(checkpoint, path, lambda values, seed=seed: damaged_json(values, seed))  # type: ignore[misc]
        refused(lambda: read_checkpoint_info(path), CheckpointError)
        count += refused(lambda: load_checkpoint(path), CheckpointError)
    assert count > 0.4 * len(SEEDS)


@pytest.mark.parametrize("field", ["slot_dim", "clip_dim"])
def test_checkpoint_that_describes_a_network_larger_than_memory(
    checkpoint: Path, tmp_path: Path, field: str
) -> None:
    def change(values: dict[str, Any]) -> dict[str, Any]:
        values["model"][field] = 10**8  # weights of some 10 to 100 GB
        return values

    path = tmp_path / "a.safetensors"
    describe(checkpoint, path, change)
    with pytest.raises(CheckpointError, match=r"expected torch\.float32 of shape"):
        load_checkpoint(path)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "uint8"])
def test_checkpoint_with_weights_of_another_dtype(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    import torch

    tensors = load_file(checkpoint)
    name = next(name for name, value in tensors.items() if value.dtype == torch.float32 and value.ndim > 1)
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    data = checkpoint.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata=header["__metadata__"])
    with pytest.raises(CheckpointError, match=dtype):
        load_checkpoint(path)


def test_manifest(tiny_bundle: Path) -> None:
    data = (tiny_bundle / "manifest.json").read_bytes()
    values = json.loads(data)
    values.pop("manifest_sha256")
    count = 0
    for seed in SEEDS:
        damaged = damaged_bytes(data, seed)
        assert refused(lambda damaged=damaged: read_manifest(damaged, where="a"), ArtifactError)
        changed = damaged_json(values, seed)
        content = dumped(changed)
        try:  # with the right digest, where it can be taken
            digest = hashlib.sha256(canonical_json(changed).encode()).hexdigest()
            content = dumped({"manifest_sha256": digest, **changed})
        except ValueError:
            pass
        count += refused(lambda content=content: read_manifest(content, where="a"), ArtifactError)
    assert count > 0.5 * len(SEEDS)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, "null", "[]", "", "\ufeff{}", "{" + "0" * 100_000, "9" * 10_000],
)
def test_text_that_is_no_manifest(content: str) -> None:
    with pytest.raises(ArtifactError):
        read_manifest(content, where="a")
    with pytest.raises(ArtifactError):
        read_manifest(content.encode(), where="a")


def reading_golden(manifest: ArtifactManifest, folder: Path) -> Callable[[], object]:
    return lambda: read_golden(folder, clip=manifest.clip, outputs=manifest.outputs)


def test_golden_clips(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    data = (tiny_bundle / "golden.npz").read_bytes()
    count = 0
    for seed in SEEDS:
        (tmp_path / "golden.npz").write_bytes(damaged_bytes(data, seed))
        count += refused(reading_golden(manifest, tmp_path), ArtifactError)
    assert count > 0.5 * len(SEEDS)


HEADERS = {
    "98 GB": "{'descr': '|u1', 'fortran_order': False, 'shape': (98000000000,)}",
    "overflow": "{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4)}",
    "two negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -4)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    "no bytes": "{'descr': '|V0', 'fortran_order': False, 'shape': (98000000000,)}",
    "deep": "(" * 900 + ")" * 900,
    "no table": "3",
    "text": "{'descr': '<U1000000000', 'fortran_order': False, 'shape': (1,)}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_golden_clips_that_claim_what_is_not_there(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    text = HEADERS[name].encode() + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    with zipfile.ZipFile(tmp_path / "golden.npz", "w") as archive:
        archive.writestr("video.npy", array)
    assert refused(reading_golden(open_bundle(tiny_bundle).manifest, tmp_path), ArtifactError)


def test_golden_clips_that_unpack_to_more_than_they_claim(tiny_bundle: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, *TINY_CLIP.clip_shape), np.uint8))
    with zipfile.ZipFile(tmp_path / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("video.npy", stream.getvalue() + bytes(1 << 24))
    assert refused(reading_golden(open_bundle(tiny_bundle).manifest, tmp_path), ArtifactError)


def test_sidecar(tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    info = EngineInfo(
        provider="tensorrt", provider_version="10.1", compute_capabilities=("8.6",), precision="fp32",
        onnx_sha256="0" * 64, contract_hash="0" * 64, clip_shape=(4, 32, 32, 3), outputs=("logits",),
        batch=BatchProfile(min=1, opt=8, max=64), build_seconds=1.5,
    )  # fmt: skip
    write_sidecar(engine, info)
    path = sidecar_path(engine)
    data, values = path.read_bytes(), json.loads(path.read_text())
    for seed in SEEDS:
        path.write_bytes(damaged_bytes(data, seed))
        refused(lambda: read_sidecar(engine), ArtifactError)
        path.write_text(dumped(damaged_json(values, seed)))
        refused(lambda: read_sidecar(engine), ArtifactError)


def test_onnx_file(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    manifest = open_bundle(tiny_bundle).manifest
    data, path = (tiny_bundle / "model.onnx").read_bytes(), tmp_path / "a.onnx"
    for seed in SEEDS:
        path.write_bytes(damaged_bytes(data, seed))
        refused(
            lambda: OrtRuntime(path, clip=manifest.clip, output_names=manifest.output_names, threads=1),
            ArtifactError,
        )


@pytest.mark.parametrize("where", ["initializer", "attribute"])
def test_onnx_file_with_weights_in_another_file(tiny_bundle: Path, tmp_path: Path, where: str) -> None:
    """Beside the file they would be read, and no digest covers them."""
    onnx = pytest.importorskip("onnx")
    from onnx.external_data_helper import set_external_data

    model = onnx.load(tiny_bundle / "model.onnx")
    tensor = next(one for one in model.graph.initializer if len(one.dims) == 5)
    if where == "attribute":
        constant = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, constant)
        tensor = model.graph.node[0].attribute[0].t
    (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
    set_external_data(tensor, "weights.bin", offset=0, length=len(tensor.raw_data))
    tensor.ClearField("raw_data")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="refers to weights in another file"):
        open_model(tmp_path / "a.onnx")


@pytest.mark.parametrize("labels", [["sit"], [], ["x"] * 7])
def test_onnx_file_with_more_or_fewer_labels_than_logits(
    tiny_bundle: Path, tmp_path: Path, labels: list[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(tiny_bundle / "model.onnx")
    next(prop for prop in model.metadata_props if prop.key == "ivdr.labels").value = canonical_json(labels)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match=f"{len(labels)} labels for logits"):
        open_model(tmp_path / "a.onnx")


@pytest.mark.parametrize("shape", [[], [7], [6, 1]])
def test_manifest_whose_labels_are_not_those_of_the_logits(tiny_bundle: Path, shape: list[int]) -> None:
    values = json.loads((tiny_bundle / "manifest.json").read_bytes())
    del values["manifest_sha256"]
    next(output for output in values["outputs"] if output["name"] == "logits")["shape"] = shape
    digest = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    with pytest.raises(ArtifactError, match="labels"):
        read_manifest(dumped({"manifest_sha256": digest, **values}), where="a")


def test_onnx_metadata(tiny_bundle: Path) -> None:
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    props = OrtRuntime(tiny_bundle / "model.onnx").metadata.to_props()
    for seed in SEEDS:
        changed = damaged_json(props, seed)
        texts = {key: value if isinstance(value, str) else dumped(value) for key, value in changed.items()}
        refused(lambda texts=texts: OnnxMetadata.from_props(texts, where="a"), ArtifactError)
        raw = {key: damaged_bytes(value.encode(), seed) for key, value in props.items()}
        texts = {key: value.decode("utf-8", "surrogateescape") for key, value in raw.items()}
        refused(lambda texts=texts: OnnxMetadata.from_props(texts, where="a"), ArtifactError)
