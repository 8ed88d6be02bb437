from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.serving.core.settings import EndpointSettings, ServiceSettings
from ivdr_deploy.serving.torchserve.archive import build_archive, handler_source, open_archive

SETTINGS = EndpointSettings(batch_size=3, service=ServiceSettings(top_k=2))


@pytest.fixture(scope="module")
def packed(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(tiny_bundle, model_store=tmp_path_factory.mktemp("store"), settings=SETTINGS).path


def test_archive_holds_one_runtime_the_handler_and_the_settings(packed: Path, tiny_bundle: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        names = set(archive.namelist())
        assert archive.read("ivdr_handler.py") == handler_source().read_bytes()
        assert archive.read("bundle/model.onnx") == (tiny_bundle / "model.onnx").read_bytes()
    assert {"bundle/manifest.json", "bundle/golden.npz", "model-config.yaml"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    opened = open_archive(packed)
    assert opened.settings == SETTINGS
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


def test_model_that_the_bundle_lacks_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = EndpointSettings(service=ServiceSettings(runtime="tensorrt"))
    with pytest.raises(ArtifactError, match="holds no fp32 model for tensorrt"):
        build_archive(tiny_bundle, model_store=tmp_path, settings=settings)
    assert not list(tmp_path.iterdir())


def rewrite(packed: Path, target: Path, *, change: str | None = None, drop: str | None = None) -> Path:
    """Copy an archive with one byte of a member changed, or without a member."""
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = bytearray(old.read(name))
            if name == change:
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


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_text("hello")
    with pytest.raises(ArtifactError, match="cannot be read as an archive"):
        open_archive(tmp_path / "a.mar")
    with pytest.raises(ArtifactError, match="cannot be read as an archive"):
        open_archive(tmp_path / "absent.mar")
