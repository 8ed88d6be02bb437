from pathlib import Path

import pytest

from ivdr_deploy.artifacts.kinds import Kind, identify
from ivdr_deploy.errors import ArtifactError


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.safetensors", Kind.CHECKPOINT),
        ("a.onnx", Kind.ONNX),
        ("a.engine", Kind.ENGINE),
        ("a.mar", Kind.ARCHIVE),
        ("a.parquet", Kind.SHARD),
    ],
)
def test_a_file_is_told_by_its_suffix(tmp_path: Path, name: str, kind: Kind) -> None:
    (tmp_path / name).touch()
    assert identify(tmp_path / name) == (kind, tmp_path / name)
    assert identify(str(tmp_path / name)) == (kind, tmp_path / name)


@pytest.mark.parametrize(("inside", "kind"), [("manifest.json", Kind.BUNDLE), ("_run.json", Kind.SCORES)])
def test_a_folder_is_told_by_what_it_holds(tmp_path: Path, inside: str, kind: Kind) -> None:
    (tmp_path / inside).touch()
    assert identify(tmp_path) == (kind, tmp_path)
    assert identify(tmp_path / inside) == (kind, tmp_path)  # the file stands for its folder


def test_a_sidecar_stands_for_its_plan(tmp_path: Path) -> None:
    (tmp_path / "a.engine").touch()
    assert identify(tmp_path / "a.engine.json") == (Kind.ENGINE, tmp_path / "a.engine")


def test_what_is_absent_or_foreign_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "folder.onnx").mkdir()
    for path, what in [
        (tmp_path / "x.onnx", "is absent"),
        (tmp_path / "x.engine.json", "is absent"),
        (tmp_path / "manifest.json", "is absent"),
        (tmp_path / ("x" * 300), "is absent"),
        (Path("a\0b"), "is absent"),
        (tmp_path / "a.txt", "is no artifact of ivdr"),
        (tmp_path, "neither a bundle nor a score table"),
        (tmp_path / "folder.onnx", "neither a bundle nor a score table"),
    ]:
        with pytest.raises(ArtifactError, match=what) as caught:
            identify(path)
        assert ".safetensors" in caught.value.hint
