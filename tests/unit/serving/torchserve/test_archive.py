from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage import damaged_bytes
from full_disk import run_on_full_disk

from ivdr_deploy.artifacts.archive import LIST_FILE, check_unpacked, seal_archive
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.cli._describe import describe
from ivdr_deploy.errors import ArtifactError, ConfigError, ContractMismatchError
from ivdr_deploy.runtimes.loading import open_model
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


BUILD = """
from pathlib import Path
from ivdr_deploy.serving.torchserve import archive
from ivdr_deploy.serving.torchserve.settings import EndpointSettings
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
@pytest.mark.parametrize("what", ["golden.npz", "model.onnx", "archive"])
def test_a_full_disk_is_named_by_its_folder_while_the_archive_is_made(
    packed: Path, tiny_bundle: Path, tmp_path: Path, what: str
) -> None:
    """Copies of the bundle lie in the temporary folder, and so does what the archiver, a process, makes of them."""
    sizes = {name: (tiny_bundle / name).stat().st_size for name in ("golden.npz", "model.onnx")}
    limit = (
        sizes["model.onnx"] + 1 if what == "archive" else sizes[what] - 1
    )  # a copy of the model fits, no more
    temporary, store = tmp_path / "temporary", tmp_path / "store"
    for folder in (temporary, store):
        folder.mkdir()
    shutil.copy(packed, store / "tiny.mar")
    arguments = f"Path({str(tiny_bundle)!r}), model_store=Path({str(store)!r}), settings=EndpointSettings()"
    found = run_on_full_disk(
        f"archive.build_archive({arguments})",
        limit=limit,
        before=f"{BUILD}\nfill()",
        environment={"TMPDIR": str(temporary)},
    )
    assert found == (9, f"ivdr: {temporary}: File too large")
    assert not list(temporary.iterdir())
    assert [path.name for path in store.iterdir()] == ["tiny.mar"]
    assert (store / "tiny.mar").read_bytes() == packed.read_bytes()


def test_a_full_model_store_is_named(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr("ivdr_deploy.serving.torchserve.archive.shutil.move", full)
    with pytest.raises(OSError, match="No space left") as caught:
        build_archive(tiny_bundle, model_store=tmp_path / "store", settings=SETTINGS)
    assert caught.value.filename == str(tmp_path / "store")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
def test_a_disk_too_full_to_unpack_an_archive_is_no_fault_of_the_archive(
    packed: Path, tmp_path: Path
) -> None:
    found = run_on_full_disk(
        f"open_model({str(packed)!r})",
        limit=100_000,
        before="from ivdr_deploy.runtimes.loading import open_model\nfill()",
        environment={"TMPDIR": str(tmp_path)},
    )
    assert found == (9, f"ivdr: {tmp_path}: File too large")
    assert not list(tmp_path.iterdir())


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
        (ServiceSettings(max_clips=1), ConfigError, "the bundle's view plan takes 2 clips"),
    ],
)
def test_what_no_worker_could_serve_is_not_packed(
    tiny_bundle: Path, tmp_path: Path, service: ServiceSettings, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        build_archive(tiny_bundle, model_store=tmp_path, settings=EndpointSettings(service=service))
    assert not list(tmp_path.iterdir())


def rewrite(packed: Path, target: Path, changes: dict[str, bytes | None], *, reseal: bool = False) -> Path:
    """Copy an archive with some members changed, added, or taken out (None); ``reseal``: with a true list again."""
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(target, "w") as new:
        content: dict[str, bytes | None] = {name: old.read(name) for name in old.namelist()}
        for name, data in (content | changes).items():
            if data is not None and not (reseal and name == LIST_FILE):
                new.writestr(name, data)
    if reseal:
        seal_archive(target)
    return target


def members(packed: Path) -> list[str]:
    with zipfile.ZipFile(packed) as archive:
        return archive.namelist()


def flipped(packed: Path, name: str) -> bytes:
    with zipfile.ZipFile(packed) as archive:
        content = bytearray(archive.read(name))
    content[len(content) // 2] ^= 1
    return bytes(content)


def test_one_changed_byte_of_any_member_is_found(packed: Path, tmp_path: Path) -> None:
    for name in members(packed):
        changed = rewrite(packed, tmp_path / "changed.mar", {name: flipped(packed, name)})
        with pytest.raises(ArtifactError) as caught:
            open_archive(changed)
        assert Path(name).name in str(caught.value)
        assert "ivdr archive" in caught.value.hint


def test_random_flips_of_the_file_serve_what_was_packed_or_are_refused(packed: Path, tmp_path: Path) -> None:
    data, chance = packed.read_bytes(), random.Random(7)
    expected, path = open_archive(packed), tmp_path / "flipped.mar"
    for _ in range(150):
        place = chance.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
        try:
            found = open_archive(path)
        except ArtifactError:
            continue
        assert replace(found, path=packed) == expected  # a time stamp, for example, is not read
        with zipfile.ZipFile(path) as changed, zipfile.ZipFile(packed) as whole:
            assert all(changed.read(name) == whole.read(name) for name in members(packed))


def test_whatever_is_damaged_it_is_shown_and_runs_as_packed_or_is_refused(
    packed: Path, tmp_path: Path
) -> None:
    data, path = packed.read_bytes(), tmp_path / "damaged.mar"
    shown, whole = describe(packed).values, open_model(packed)
    whole.runtime.close()
    refused = 0
    for seed in range(100):
        path.write_bytes(damaged_bytes(data, seed))
        try:
            values = describe(path).values
        except ArtifactError as error:
            refused += 1
            message = str(error)
            with pytest.raises(ArtifactError):
                open_model(path)
            assert len(message) < 1000
            continue
        model = open_model(path)
        model.runtime.close()
        assert values == shown
        assert model.manifest == whole.manifest
    assert refused > 80


@pytest.mark.parametrize("reseal", [False, True])
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
def test_missing_member_is_named(packed: Path, tmp_path: Path, member: str, reseal: bool) -> None:
    with pytest.raises(ArtifactError, match=member.replace(".", r"\.")):
        open_archive(rewrite(packed, tmp_path / "short.mar", {member: None}, reseal=reseal))


@pytest.mark.parametrize(
    "name", ["torch.py", "bundle/extra.bin", "../outside.py", "/etc/outside", "MAR-INF/x"]
)
def test_added_member_is_named(packed: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=f"'{name}' was added"):
        open_archive(rewrite(packed, tmp_path / "more.mar", {name: b"import os"}))


@pytest.mark.parametrize("name", ["../outside.py", "/etc/outside"])
def test_member_outside_the_folder_is_refused_in_a_true_list_too(
    packed: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ArtifactError, match="would lie outside"):
        open_archive(rewrite(packed, tmp_path / "outside.mar", {name: b"import os"}, reseal=True))


def test_member_that_the_directory_does_not_list_is_refused(packed: Path, tmp_path: Path) -> None:
    # TorchServe reads from front to back: it would unpack the hidden member over the one before it.
    hidden = tmp_path / "hidden.zip"
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr("ivdr_handler.py", "import os")
        directory = archive.start_dir
    data, before = hidden.read_bytes()[:directory], tmp_path / "before.mar"
    before.write_bytes(data + packed.read_bytes())
    with pytest.raises(ArtifactError, match="is not stored as"):
        open_archive(before)
    between = tmp_path / "between.mar"
    shutil.copy(packed, between)
    with zipfile.ZipFile(between, "a") as archive:
        assert archive.fp is not None
        archive.fp.seek(archive.start_dir)
        archive.fp.write(data)
        archive.start_dir = archive.fp.tell()
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match="its directory does not list"):
        open_archive(between)


@pytest.mark.parametrize("written", ["{}", "{}\0.txt"])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("place", ["first", "before", "last"])
@pytest.mark.parametrize("name", ["ivdr_handler.py", "bundle/model.onnx", LIST_FILE])
def test_second_member_of_a_name_is_refused(
    packed: Path, tmp_path: Path, name: str, place: str, same: bool, written: str
) -> None:
    """It lies last, where TorchServe takes it for the true one; Python takes the last that the directory names."""
    twice = Path(shutil.copy(packed, tmp_path / "twice.mar"))
    with zipfile.ZipFile(twice, "a") as archive:
        content = archive.read(name) if same else b"import os"
        second = zipfile.ZipInfo(name)
        second.filename = written.format(name)  # Python reads a name as far as its first null byte
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile's, about the name
            archive.writestr(second, content)
        entry, listed = archive.filelist.pop(), archive.namelist()
        at = {"first": 0, "before": listed.index(name), "last": len(listed)}[place]
        archive.filelist.insert(at, entry)
    with pytest.raises(ArtifactError, match=f"it holds '{re.escape(name)}' twice"):
        open_archive(twice)


@pytest.mark.parametrize("key", ["modelFile", "requirementsFile", "serializedFile", "extensions"])
def test_manifest_of_the_archiver_names_nothing_more_to_load(packed: Path, tmp_path: Path, key: str) -> None:
    with zipfile.ZipFile(packed) as archive:
        values = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    values["model"][key] = "evil.py"
    changes: dict[str, bytes | None] = {"MAR-INF/MANIFEST.json": json.dumps(values).encode()}
    with pytest.raises(ArtifactError, match=r"MANIFEST\.json says"):
        open_archive(rewrite(packed, tmp_path / "more.mar", changes, reseal=True))


@pytest.mark.parametrize("member", ["MAR-INF/MANIFEST.json", "bundle/manifest.json", "model-config.yaml"])
@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"1", b"[" * 100_000, b'{"model": []}'])
def test_damage_that_a_true_list_covers_is_an_error_of_ours(
    packed: Path, tmp_path: Path, member: str, text: bytes
) -> None:
    with pytest.raises(ArtifactError):
        open_archive(rewrite(packed, tmp_path / "damaged.mar", {member: text}, reseal=True))


def test_archive_of_a_former_version_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="of a former version") as caught:
        open_archive(rewrite(packed, tmp_path / "old.mar", {LIST_FILE: None}))
    assert "make it again" in caught.value.hint


@pytest.fixture
def unpacked(packed: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "model")
    return tmp_path / "model"


def test_worker_finds_what_was_changed_after_packing(unpacked: Path) -> None:
    (unpacked / "__pycache__").mkdir()
    (unpacked / "__pycache__" / "ivdr_handler.cpython-311.pyc").touch()
    check_unpacked(unpacked)
    for name in ("ivdr_handler.py", "model-config.yaml", "MAR-INF/MANIFEST.json", LIST_FILE):
        content = (unpacked / name).read_bytes()
        (unpacked / name).write_bytes(content + b" ")
        with pytest.raises(ArtifactError, match=f"{Path(name).name}'? was changed"):
            check_unpacked(unpacked)
        (unpacked / name).unlink()
        with pytest.raises(ArtifactError, match=Path(name).name):
            check_unpacked(unpacked)
        (unpacked / name).write_bytes(content)
    (unpacked / "numpy.py").touch()
    with pytest.raises(ArtifactError, match=r"'numpy\.py' was added"):
        check_unpacked(unpacked)


def test_archive_runs_by_itself_like_its_bundle(
    packed: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
    with open_model(packed).runtime as alone, open_model(tiny_bundle).runtime as bundled:
        assert np.array_equal(alone.infer(clips)["logits"], bundled.infer(clips)["logits"])
        assert not list(tmp_path.iterdir()), "nothing stays behind in the temporary folder"


def test_model_of_an_archive_says_where_it_comes_from(packed: Path) -> None:
    model = open_model(packed)
    with model.runtime:
        assert (model.path, model.name, model.variant) == (packed, "tiny", "onnx-fp32")
        assert model.golden_max_abs_diff
        assert model.decode_mean_diff


def test_changed_archive_runs_no_more_than_it_is_served(packed: Path, tmp_path: Path) -> None:
    changed = rewrite(packed, tmp_path / "x.mar", {"ivdr_handler.py": b"import os"})
    with pytest.raises(ArtifactError, match=r"ivdr_handler\.py' was changed"):
        open_model(changed)
    with pytest.raises(ContractMismatchError, match=r"tiny\.mar"):
        open_model(packed, expected_contract="0" * 64)


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mar").write_text("hello")
    with pytest.raises(ArtifactError, match="cannot be read as an archive"):
        open_archive(tmp_path / "a.mar")
    with pytest.raises(ArtifactError, match="cannot be read as an archive"):
        open_archive(tmp_path / "absent.mar")
