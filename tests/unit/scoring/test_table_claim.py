"""Whose folder it is: other runs, other files, other writers, and what killed ones left."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from rights import let_all_enter, without_rights
from score_tables import INPUTS, MANIFEST, PLAN, SHARDS, keys, write

from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.errors import DataError, FolderError
from ivdr_deploy.scoring.index import INDEX_FILE
from ivdr_deploy.scoring.plan import TABLE_VERSION
from ivdr_deploy.scoring.reader import read_scores
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table


def test_what_a_killed_writer_left_is_removed(out):
    write(out, count=1)
    half_written = out / f".{SHARDS[1].name}.0123456789abcdef.tmp"
    half_written.mkdir()
    (half_written / SHARDS[1].name).write_bytes(b"PAR1")
    never_again = out / ".part-000000099-0123456789abcdef.parquet.0123456789abcdef.tmp"
    never_again.mkdir()

    write(out)

    assert not half_written.exists()
    assert not never_again.exists()
    assert read_scores(out).num_rows == 5


def test_a_writer_killed_before_its_ledger_leaves_a_folder_that_can_be_used(out):
    out.mkdir()
    (out / "_run.lock").touch()
    (out / "._run.json.0123456789abcdef.tmp").mkdir()

    write(out)

    assert read_scores(out).num_rows == 5


def test_the_scores_of_another_run_are_refused_and_the_difference_is_named(out):
    write(out, count=1)

    with (
        pytest.raises(FolderError, match=r"another run.*model_sha256: bb, not other") as caught,
        open_table(FolderStore(out), replace(PLAN, model_sha256="other"), manifest=MANIFEST),
    ):
        pass
    assert "choose another folder" in caught.value.hint


def test_a_new_folder_is_there_for_good_before_rows_are_written_to_it(tmp_path, monkeypatch):
    """Else a machine that loses its power may lose it with all that was flushed into it."""
    out, flush, flushed = tmp_path / "out", os.fsync, []

    def noted(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, out.is_dir()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with FolderStore(out).claim():
        assert (tmp_path.stat().st_ino, True) in flushed


def test_a_run_that_wrote_nothing_gives_its_folder_up(out):
    write(out, count=0)
    other = replace(PLAN, top_k=1)

    write(out, plan=other, count=0)

    assert json.loads((out / LEDGER_FILE).read_text())["run_id"] == other.run_id
    write(out, plan=other)
    for path in out.glob("part-*"):
        path.unlink()
    write(out, count=0)
    assert not (out / INDEX_FILE).exists(), "it is of the other run"


def test_a_folder_with_other_files_is_refused(out):
    out.mkdir()
    (out / "holiday.jpg").touch()

    with pytest.raises(FolderError, match=r"is no score table \(it holds holiday.jpg\)"):
        write(out)
    assert [path.name for path in out.iterdir()] == ["holiday.jpg"]


def test_a_file_in_place_of_the_folder_is_refused(out):
    out.touch()

    with pytest.raises(FolderError, match="is a file"):
        write(out)
    out.unlink()
    out.symlink_to("absent")
    with pytest.raises(FolderError, match="is a link that leads to no folder"):
        write(out)


@pytest.mark.parametrize("name", ["extra.parquet", "old/part.parquet"])
def test_a_foreign_parquet_file_is_refused_when_writing_and_reading(out, name):
    write(out)
    foreign = out / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"garbage")

    with pytest.raises(FolderError, match=f"{name} is not a part of the run"):
        write(out)
    with pytest.raises(DataError, match=f"{name} is not a part of the run"):
        read_scores(out)


@pytest.mark.parametrize("version", [1, TABLE_VERSION - 1, TABLE_VERSION + 1])
def test_a_table_of_another_version_is_refused_by_its_version(out, version):
    write(out)
    ledger = out / LEDGER_FILE
    values = json.loads(ledger.read_text())
    values["plan"]["table_version"] = version
    values["plan"]["num_clips"] = 10  # a setting that this version does not have
    ledger.write_text(json.dumps(values))

    for use in (read_scores, write):
        with pytest.raises(
            DataError, match=f"of version {version}, this ivdr reads and continues version {TABLE_VERSION}"
        ):
            use(out)


def test_two_writers_at_once_are_refused(out):
    with (
        open_table(FolderStore(out), PLAN, manifest=MANIFEST),
        pytest.raises(FolderError, match="another process is writing"),
        open_table(FolderStore(out), PLAN, manifest=MANIFEST),
    ):
        pass


def test_a_table_that_a_killed_writer_left_is_called_unfinished_and_not_foreign(out):
    write(out, count=2)
    left = out / f".{SHARDS[2].name}.0123456789abcdef.tmp"
    left.mkdir()
    (left / SHARDS[2].name).write_bytes(b"PAR1")

    with pytest.raises(DataError, match="not finished"):
        read_scores(out)


def test_a_folder_that_may_not_be_written_is_named_and_loses_nothing(tmp_path):
    top = tmp_path / "shared"
    top.mkdir()
    let_all_enter(tmp_path)
    write(top / "out", count=1)
    with without_rights(), pytest.raises(PermissionError) as caught:
        write(top / "out")
    assert str(top / "out") in str(caught.value.filename)

    assert write(top / "out") == 3
    assert keys(top / "out") == [item.key for item in INPUTS]


def test_a_folder_in_which_something_cannot_be_listed_is_not_taken_for_one_without_it(tmp_path):
    let_all_enter(tmp_path)
    write(tmp_path / "out", count=1)
    store = FolderStore(tmp_path / "out")
    (tmp_path / "out" / "closed").mkdir(mode=0o700)
    with without_rights(), pytest.raises(PermissionError):
        store.names()
    (tmp_path / "out").chmod(0o300)
    with without_rights(), pytest.raises(PermissionError):
        store.names()


def test_what_is_left_of_a_table_without_ledger_and_rows_can_be_used(out):
    """The ledger was cut off before the first shard was there, and is deleted as the error says."""
    write(out, plan=replace(PLAN, top_k=1), inputs=())
    (out / LEDGER_FILE).unlink()
    (out / "_attempt-0123456789abcdef.json").write_text("{}")
    assert (out / INDEX_FILE).is_file()

    write(out, count=0)
    assert not (out / INDEX_FILE).exists(), "it is of nobody knows which run"
    write(out)
    assert read_scores(out).num_rows == 5
    (out / LEDGER_FILE).unlink()
    for path in out.glob("part-*"):
        path.unlink()
    (out / "notes.txt").touch()
    with pytest.raises(FolderError, match=r"it holds notes.txt\)"):
        write(out)


def test_a_foreign_file_is_named_also_where_the_ledger_is_gone(out):
    write(out)
    (out / LEDGER_FILE).unlink()
    (out / "extra.parquet").write_bytes(b"garbage")

    with pytest.raises(FolderError, match=r"extra.parquet is not a part of the run"):
        write(out)
