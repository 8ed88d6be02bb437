from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from score_tables import MANIFEST, PLAN, SHARDS, row, write

from ivdr_deploy.errors import DataError
from ivdr_deploy.scoring.plan import TABLE_VERSION
from ivdr_deploy.scoring.reader import read_scores
from ivdr_deploy.scoring.shard import METADATA_KEY
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table


def test_table_has_every_row_once_in_input_order(out):
    write(out)

    rows = read_scores(out).to_pylist()

    assert [entry["position"] for entry in rows] == [0, 1, 2, 3, 4]
    for position, entry in enumerate(rows):
        expected = {"position": position} | row(position)
        assert entry == {name: expected.get(name) for name in entry}


def test_schema_metadata_carries_the_manifest(out):
    write(out)

    facts = json.loads(read_scores(out).schema.metadata[METADATA_KEY])

    assert facts["manifest"] == MANIFEST
    assert facts["run_id"] == PLAN.run_id
    assert facts["plan"]["contract_hash"] == "cc"


def test_common_parquet_readers_take_the_folder_as_it_is(out):
    write(out)

    assert pq.read_table(out).num_rows == 5


def test_keys_that_have_a_row_are_done(out):
    write(out, count=1)

    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        assert table.done == {"key0", "key1"}
        assert table.outcomes() == {"ok": 1, "unreadable": 1}


def test_a_written_shard_is_never_touched_again(out):
    write(out, count=2)
    before = {path: path.stat() for path in out.glob("*.parquet")}

    write(out)

    assert len(before) == 2
    for path, stat in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_rows_of_other_inputs_are_not_written(out):
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table, pytest.raises(AssertionError):
        table.write(SHARDS[0], [row(0)])

    assert not list(out.glob("*.parquet"))


def test_an_unfinished_table_is_not_read(out):
    write(out, count=2)

    with pytest.raises(
        DataError, match="not finished: its list was not gone through to the end; 4 rows are there"
    ) as caught:
        read_scores(out)
    assert "run the same `ivdr score` command" in caught.value.hint


def test_a_folder_that_is_no_score_table_is_not_read(tmp_path):
    with pytest.raises(DataError, match="is no score table"):
        read_scores(tmp_path)


def test_the_name_of_a_folder_adds_no_column(tmp_path):
    out = tmp_path / "day=3" / "out"
    write(out)

    assert "day" not in read_scores(out).column_names


def test_a_folder_whose_name_reads_like_a_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    write(Path("scores:1"))

    assert read_scores("scores:1").num_rows == 5


def test_the_page_of_formats_names_the_version_of_the_table():
    page = Path(__file__).parents[3] / "docs" / "formats.md"
    assert f"This is table version {TABLE_VERSION};" in page.read_text()
