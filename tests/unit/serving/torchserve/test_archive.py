from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.torchserve.archive import build_archive, handler_source, open_archive
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

SETTINGS = EndpointSettings(batch_size=3, service=ServiceSettings(top_k=2))


@pytest.fixture(scope="module")
def packed(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(tiny_bundle, model_store=tmp_path_factory.mktemp("store"), settings=SETTINGS).path


def test_archive_holds_one_variant_the_handler_and_the_settings(packed: Path, tiny_bundle: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        names = set(archive.namelist())
        assert archive.read("ivdr_handler.py") == handler_source().read_bytes()
        assert archive.read("bundle/model.onnx") == (tiny_bundle / "model.onnx").read_bytes()
    assert {"bundle/manifest.json", "bundle/golden.npz", "model-config.yaml"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    assert {f"bundle/{name}" for name in open_bundle(tiny_bundle).golden().clips} <= names
    opened = open_archive(packed)
    decided = replace(SETTINGS.service, variant="onnx-fp32", device=opened.settings.service.device)
    assert opened.settings == replace(SETTINGS, service=decided)
    assert [variant.id for variant in opened.manifest.variants] == ["onnx-fp32"]
    assert opened.manifest.contract_hash == open_bundle(tiny_bundle).manifest.contract_hash


def test_only_the_archive_is_left_in_the_model_store(packed: Path) -> None:
    assert [path.name for path in packed.parent.iterdir()] == ["tiny.mar"]


def test_archiver_touches_no_folder_of_the_model_name(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "tiny" / "precious.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the archiver would delete the folder "tiny"
    build_archive(tiny_bundle, model_store=tmp_path / "store", settings=SETTINGS)
    assert mine.read_text() == "mine"


def test_modules_in_the_working_directory_are_not_executed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for module in ("torch", "argparse", "model_archiver"):
        (work / f"{module}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.chdir(work)
    build_archive(tiny_bundle, model_store=tmp_path / "store", settings=SETTINGS)
    assert not (tmp_path / "executed").exists()


def test_older_archive_stays_when_the_bundle_is_damaged(
    packed: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    old = shutil.copy(packed, store / "tiny.mar")
    damaged = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with (damaged / "model.onnx").open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model\.onnx was changed"):
        build_archive(damaged, model_store=store, settings=SETTINGS)
    assert Path(old).read_bytes() == packed.read_bytes()
    assert os.listdir(store) == ["tiny.mar"]


def test_variant_that_was_asked_for_is_packed(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = EndpointSettings(service=ServiceSettings(variant="torch-fp32", device="cpu"))
    built = build_archive(tiny_bundle, model_store=tmp_path, settings=settings)
    assert (built.settings, built.reason) == (settings, "it was asked for")
    with zipfile.ZipFile(built.path) as archive:
        assert "bundle/model.safetensors" in archive.namelist()
        assert "bundle/model.onnx" not in archive.namelist()


@pytest.mark.parametrize(
    ("service", "error", "said"),
    [
        (ServiceSettings(variant="trt-fp16"), ArtifactError, "no variant 'trt-fp16'"),
        (ServiceSettings(num_clips=500), ConfigError, "num_clips takes 500 clips"),
        (ServiceSettings(max_clips=1), ConfigError, "the bundle's view plan takes 2 clips"),
    ],
)
def test_what_no_worker_could_serve_is_not_packed(
    tiny_bundle: Path, tmp_path: Path, service: ServiceSettings, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        build_archive(tiny_bundle, model_store=tmp_path, settings=EndpointSettings(service=service))
    assert not list(tmp_path.iterdir())


def rewrite(
    packed: Path, target: Path, *, change: str | None = None, text: str | None = None, drop: str | None = None
) -> Path:
    """Copy an archive with one byte or all the text of a member changed, or without a member."""
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = bytearray(old.read(name))
            if name == change and text is not None:
                content = bytearray(text.encode())
            elif name == change:
                content[len(content) // 2] ^= 1
            if name != drop:
                new.writestr(name, bytes(content))
    return target


@pytest.mark.parametrize("member", ["bundle/model.onnx", "bundle/golden.npz", "bundle/manifest.json"])
def test_one_changed_byte_is_found(packed: Path, tmp_path: Path, member: str) -> None:
    changed = rewrite(packed, tmp_path / "changed.mar", change=member)
    with pytest.raises(ArtifactError) as caught:
        open_archive(changed)
    assert Path(member).name in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "member",
    [
        "bundle/model.onnx",
        "bundle/manifest.json",
        "ivdr_handler.py",
        "model-config.yaml",
        "MAR-INF/MANIFEST.json",
    ],
)
def test_missing_member_is_named(packed: Path, tmp_path: Path, member: str) -> None:
    with pytest.raises(ArtifactError, match=member.replace(".", r"\.")):
        open_archive(rewrite(packed, tmp_path / "short.mar", drop=member))


def test_archive_of_the_former_format_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    former = "minWorkers: 1\nhandler: {runtime: onnxruntime, precision: fp32}\nserver: {queue_size: 32}\n"
    with pytest.raises(ArtifactError, match="the archive has format 1") as caught:
        open_archive(rewrite(packed, tmp_path / "old.mar", change="model-config.yaml", text=former))
    assert "pack again" in caught.value.hint


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_text("hello")
    with pytest.raises(ArtifactError, match="cannot be read as an archive"):
        open_archive(tmp_path / "a.mar")
    with pytest.raises(ArtifactError, match="cannot be read as an archive"):
        open_archive(tmp_path / "absent.mar")
