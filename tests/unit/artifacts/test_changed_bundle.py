"""Adding a variant is a transaction: the old bundle, byte for byte, or the new one."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ivdr_deploy.artifacts import bundle as bundle_module
from ivdr_deploy.artifacts.bundle import Bundle, Draft, changed_bundle, new_bundle, open_bundle
from ivdr_deploy.artifacts.manifest import OutputParity, Target, Variant, write_manifest
from ivdr_deploy.errors import ArtifactError, FolderError


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add(
    draft: Draft, *names: str, variant_id: str = "onnx-int8", text: str = "weights", of: str = "onnx-fp32"
) -> Variant:
    """A step that adds a variant of some small files."""
    for name in names:
        draft.add_file(name, kind="model").write_text(text)
    parity = OutputParity(output="logits", max_abs_diff=0.01, min_cosine=0.999, tolerance=0.2)
    variant = Variant(
        id=variant_id,
        runtime="onnxruntime",
        precision="int8",
        files=names,
        derived_from=of,
        parity=(parity,),
    )
    draft.add_variant(variant)
    return variant


def test_a_variant_is_added_and_everything_else_stays(tiny_bundle_copy: Path) -> None:
    before, old = open_bundle(tiny_bundle_copy), content(tiny_bundle_copy)
    with changed_bundle(before) as draft:
        variant = add(draft, "int8/model.onnx", "int8/calibration.json")
        assert content(tiny_bundle_copy) == old  # nobody sees it yet
    after = open_bundle(tiny_bundle_copy)
    assert after.manifest.variants == (*before.manifest.variants, variant)
    files, variants = before.manifest.files, before.manifest.variants
    assert replace(after.manifest, files=files, variants=variants) == before.manifest
    new = content(tiny_bundle_copy)
    assert set(new) - set(old) == {"int8/model.onnx", "int8/calibration.json"}
    assert {name for name in old if old[name] != new[name]} == {"manifest.json", "MODEL_CARD.md"}
    assert "`onnx-int8`" in new["MODEL_CARD.md"].decode()
    assert [path.name for path in tiny_bundle_copy.parent.iterdir()] == ["bundle"]


def add_plan(draft: Draft, variant_id: str, *, of: str) -> None:
    draft.add_file(f"{variant_id}.engine", kind="model").write_text("plan")
    draft.add_file(f"{variant_id}.engine.json", kind="sidecar").write_text("{}")
    draft.add_variant(
        Variant(
            id=variant_id,
            runtime="tensorrt",
            precision="int8",
            provider="tensorrt",
            target=Target(device="cuda", compute_capabilities=("8.6",)),
            files=(f"{variant_id}.engine", f"{variant_id}.engine.json"),
            derived_from=of,
        )
    )


@pytest.mark.parametrize("text", ["weights", "other weights"])
def test_plans_of_a_file_that_changes_are_taken_out_and_named(tiny_bundle_copy: Path, text: str) -> None:
    with changed_bundle(open_bundle(tiny_bundle_copy)) as draft:
        add(draft, "int8.onnx", variant_id="onnx-int8-trt")
        add(draft, "other.onnx", variant_id="onnx-int8-other", of="onnx-int8-trt")
        add_plan(draft, "trt-int8-sm86", of="onnx-int8-trt")
        add_plan(draft, "trt-fp32-sm86", of="onnx-fp32")
    assert draft.dropped == []
    old = open_bundle(tiny_bundle_copy)
    with changed_bundle(old) as draft:
        add(draft, "int8.onnx", variant_id="onnx-int8-trt", text=text)
        add_plan(draft, "trt-int8-sm89", of="onnx-int8-trt")
    new = open_bundle(tiny_bundle_copy)
    gone = ["trt-int8-sm86"] if text != "weights" else []
    assert draft.dropped == gone
    held = {variant.id for variant in old.manifest.variants}
    assert {variant.id for variant in new.manifest.variants} == held - {*gone} | {"trt-int8-sm89"}
    for name in ("trt-int8-sm86.engine", "trt-int8-sm86.engine.json"):
        assert (tiny_bundle_copy / name).exists() != bool(gone)


def test_an_exception_leaves_the_old_bundle_byte_for_byte(tiny_bundle_copy: Path) -> None:
    old = content(tiny_bundle_copy)

    def fail() -> None:
        with changed_bundle(open_bundle(tiny_bundle_copy)) as draft:
            add(draft, "model.onnx", variant_id="onnx-fp32")
            draft.add_file("golden.npz", kind="golden").write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert content(tiny_bundle_copy) == old
    assert [path.name for path in tiny_bundle_copy.parent.iterdir()] == ["bundle"]


def test_files_of_the_old_bundle_are_not_written_through(tiny_bundle_copy: Path, tmp_path: Path) -> None:
    """Old files are linked, not copied: whoever holds such a file, as a backup say, keeps what it was."""
    backup = tmp_path / "backup"
    backup.mkdir()
    for name in content(tiny_bundle_copy):
        os.link(tiny_bundle_copy / name, backup / name)
    kept = content(backup)
    with changed_bundle(open_bundle(tiny_bundle_copy)) as draft:
        add(draft, "model.onnx", variant_id="onnx-fp32")
    assert (tiny_bundle_copy / "model.onnx").read_text() == "weights"
    assert content(backup) == kept
    unchanged = "model.safetensors"
    assert (backup / unchanged).stat().st_ino == (tiny_bundle_copy / unchanged).stat().st_ino


def test_where_links_are_not_possible_files_are_copied(
    tiny_bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("links are not supported here")

    monkeypatch.setattr(os, "link", refuse)
    with changed_bundle(open_bundle(tiny_bundle_copy)) as draft:
        add(draft, "x.bin")
    assert open_bundle(tiny_bundle_copy).variant("onnx-int8").files == ("x.bin",)


def test_a_variant_of_the_same_id_takes_the_place_of_the_old_one(tiny_bundle_copy: Path) -> None:
    with changed_bundle(open_bundle(tiny_bundle_copy)) as draft:
        add(draft, "a.bin", "shared.bin", "b.bin")
        add(draft, "shared.bin", variant_id="another")
    with changed_bundle(open_bundle(tiny_bundle_copy)) as draft:
        add(draft, "b.bin", "c.bin", text="other weights")
    bundle = open_bundle(tiny_bundle_copy)
    assert [held.id for held in bundle.manifest.variants] == [
        "torch-fp32", "onnx-fp32", "another", "onnx-int8"
    ]  # fmt: skip
    assert bundle.variant("onnx-int8").files == ("b.bin", "c.bin")
    assert sorted(name for name in content(tiny_bundle_copy) if name.endswith(".bin")) == [
        "b.bin", "c.bin", "shared.bin"
    ]  # fmt: skip
    assert (tiny_bundle_copy / "b.bin").read_text() == "other weights"


def test_of_two_that_end_at_the_same_time_one_is_told(
    tiny_bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, looked = open_bundle(tiny_bundle_copy), threading.local()
    both = threading.Barrier(2)
    require_unchanged = bundle_module._require_unchanged

    def slow(bundle: Bundle) -> None:
        require_unchanged(bundle)
        looked.count = getattr(looked, "count", 0) + 1
        if looked.count == 2:  # the last look: without a lock both are here now, and both go on
            with suppress(threading.BrokenBarrierError):
                both.wait(1.0)

    monkeypatch.setattr(bundle_module, "_require_unchanged", slow)

    def change(name: str) -> str:
        try:
            with changed_bundle(bundle) as draft:
                add(draft, f"{name}.bin", variant_id=name)
        except FolderError:
            return ""
        return name

    with ThreadPoolExecutor(2) as threads:
        done = [name for name in threads.map(change, ("one", "two")) if name]
    after = open_bundle(tiny_bundle_copy)
    assert [variant.id for variant in after.manifest.variants] == ["torch-fp32", "onnx-fp32", *done]
    assert len(done) == 1
    assert [path.name for path in tiny_bundle_copy.parent.iterdir()] == ["bundle"]


def test_a_bundle_that_changed_while_the_work_was_done_is_left_alone(tiny_bundle_copy: Path) -> None:
    bundle = open_bundle(tiny_bundle_copy)

    def race() -> None:
        with changed_bundle(bundle) as mine:
            add(mine, "mine.bin", variant_id="mine")
            with changed_bundle(bundle) as theirs:
                add(theirs, "theirs.bin", variant_id="theirs")

    with pytest.raises(FolderError, match="was changed by another process") as caught:
        race()
    assert "again" in caught.value.hint
    assert [held.id for held in open_bundle(tiny_bundle_copy).manifest.variants][2:] == ["theirs"]


def test_a_bundle_that_changed_since_it_was_opened_is_left_alone(tiny_bundle_copy: Path) -> None:
    stale = open_bundle(tiny_bundle_copy)
    with changed_bundle(stale) as draft:
        add(draft, "x.bin")
    old = content(tiny_bundle_copy)
    with pytest.raises(FolderError, match="was changed by another process"), changed_bundle(stale):
        pytest.fail("minutes of work that cannot be kept must not begin")
    assert content(tiny_bundle_copy) == old


def test_files_of_somebody_else_are_never_lost(tiny_bundle_copy: Path) -> None:
    bundle = open_bundle(tiny_bundle_copy)

    def notes_appear() -> None:
        with changed_bundle(bundle) as draft:
            add(draft, "x.bin")
            (tiny_bundle_copy / "notes.txt").write_text("mine")

    for _ in range(2):  # while the work is done, and before it begins
        with pytest.raises(FolderError, match=r"not the bundle's: 'notes\.txt'"):
            notes_appear()
        assert (tiny_bundle_copy / "notes.txt").read_text() == "mine"
    assert open_bundle(tiny_bundle_copy).manifest == bundle.manifest


def test_a_link_to_a_bundle_stays_a_link(tiny_bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("bundle")
    with changed_bundle(open_bundle(tmp_path / "current")) as draft:
        add(draft, "x.bin")
    assert (tmp_path / "current").is_symlink()
    assert open_bundle(tiny_bundle_copy).variant("onnx-int8").files == ("x.bin",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "current"]


KILLED = """
import os, signal, sys
from ivdr_deploy.artifacts import bundle as module

moment = sys.argv[2]
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "manifest":
    module.write_manifest = die
elif moment == "swap":
    from ivdr_deploy import _files
    _files._exchange = die
with module.changed_bundle(module.open_bundle(sys.argv[1])) as draft:
    draft.add_file("model.onnx", kind="model").write_text("half")
    if moment == "work":
        die()
"""


@pytest.mark.parametrize("moment", ["work", "manifest", "swap"])
def test_a_kill_leaves_the_old_bundle(tiny_bundle_copy: Path, moment: str) -> None:
    old = content(tiny_bundle_copy)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tiny_bundle_copy), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content(tiny_bundle_copy) == old
    open_bundle(tiny_bundle_copy)


def test_a_new_bundle_takes_the_place_of_the_old_one_or_of_nothing(
    tiny_bundle_copy: Path, tmp_path: Path
) -> None:
    manifest = replace(open_bundle(tiny_bundle_copy).manifest, version="2.0")
    for out in (tiny_bundle_copy, tmp_path / "deep" / "new"):
        with new_bundle(out, manifest) as draft:
            add(draft, "x.bin")
        assert set(content(out)) == {"x.bin", "manifest.json", "MODEL_CARD.md"}
        assert open_bundle(out).manifest.version == "2.0"


def test_what_somebody_puts_there_while_a_bundle_is_made_is_not_lost(
    tiny_bundle_copy: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(tiny_bundle_copy).manifest

    def disturbed(out: Path) -> None:
        with new_bundle(out, manifest) as draft:
            add(draft, "x.bin")
            out.mkdir(exist_ok=True)
            (out / "notes.txt").write_text("mine")

    for out in (tiny_bundle_copy, tmp_path / "new"):
        with pytest.raises(FolderError):
            disturbed(out)
        assert (out / "notes.txt").read_text() == "mine"
        assert not (out / "x.bin").exists()


def test_a_file_that_was_announced_and_never_written_spoils_the_draft(tiny_bundle_copy: Path) -> None:
    old = content(tiny_bundle_copy)

    def forgotten() -> None:
        with changed_bundle(open_bundle(tiny_bundle_copy)) as draft:
            draft.add_file("announced.bin", kind="model")

    with pytest.raises(FileNotFoundError, match=r"announced\.bin"):
        forgotten()
    assert content(tiny_bundle_copy) == old


def test_a_damaged_bundle_is_not_changed(tiny_bundle_copy: Path) -> None:
    bundle = open_bundle(tiny_bundle_copy)
    (tiny_bundle_copy / "manifest.json").write_text("{")
    with pytest.raises((FolderError, ArtifactError)), changed_bundle(bundle):
        pass
    assert (tiny_bundle_copy / "manifest.json").read_text() == "{"
    write_manifest(tiny_bundle_copy, bundle.manifest)
    open_bundle(tiny_bundle_copy)
