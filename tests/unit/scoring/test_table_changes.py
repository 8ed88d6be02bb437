"""A list that changed between two runs into one table."""

from __future__ import annotations

import errno

import pyarrow.parquet as pq
import pytest
from score_tables import INPUTS, MANIFEST, PLAN, SHARDS, index_of, keys, plain_keys, row, shards, write

from ivdr_deploy.errors import DataError
from ivdr_deploy.scoring.index import INDEX_FILE
from ivdr_deploy.scoring.reader import read_present, read_scores
from ivdr_deploy.scoring.shard import make_shard
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table


def test_a_list_that_grew_and_changed_its_order_keeps_its_rows(out):
    write(out, inputs=INPUTS[:3])
    before = {path.name: path.stat().st_ino for path in out.glob("part-*")}

    mixed = tuple(item._replace(position=place) for place, item in enumerate(INPUTS[::-1]))
    assert write(out, inputs=mixed) == 2

    assert keys(out) == ["key4", "key3", "key2", "key1", "key0"]
    assert read_present(out, columns=["uri"]).rows["input_key"].to_pylist() == keys(out)
    assert read_scores(out)["position"].to_pylist() == [0, 1, 2, 3, 4]
    assert before.items() <= {path.name: path.stat().st_ino for path in out.glob("part-*")}.items()
    assert read_scores(out).num_rows == 5


def test_rows_whose_input_left_the_list_are_dropped(out):
    write(out)

    assert write(out, inputs=(INPUTS[0], INPUTS[4])) == 0

    assert keys(out) == ["key0", "key4"] == plain_keys(out)
    assert len(list(out.glob("part-*"))) == 2


def test_a_file_that_was_replaced_has_one_row(out):
    write(out)
    other = INPUTS[1]._replace(key="another")
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        (shard,) = shards((other,))
        table.write(shard, [row(1) | {"input_key": "another"}])
        assert keys(out) == [item.key for item in INPUTS]  # the list before is still whole
        table.write_index(index_of((INPUTS[0], other, *INPUTS[2:])), partial=False)
        assert table.settle(5) == 1

    assert keys(out) == ["key0", "another", "key2", "key3", "key4"]
    assert plain_keys(out) == sorted(keys(out))


def test_a_label_that_the_list_changed_is_changed_in_the_row_and_nothing_is_scored(out):
    write(out)
    relabelled = tuple(item._replace(label="sit") if item.position == 2 else item for item in INPUTS)

    assert write(out, inputs=relabelled) == 0

    labels = [None, None, "sit", None, None]
    assert read_scores(out)["label"].to_pylist() == labels
    assert sorted(map(str, pq.read_table(out)["label"].to_pylist())) == sorted(map(str, labels))


def test_rows_of_a_part_of_the_list_leave_the_others(out):
    write(out)
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        table.write_index(index_of((INPUTS[3],)), partial=True)
        assert table.settle(1) == 0

    assert keys(out) == ["key3", "key0", "key1", "key2", "key4"]


def test_rows_that_are_there_twice_are_read_once_and_dropped_by_the_next_run(out):
    """A kill between the two steps that put one shard in the place of another."""
    write(out)
    again = make_shard(PLAN.run_id, INPUTS[1:2])
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        table.write(again, [row(1)])
    assert len(plain_keys(out)) == 6

    assert keys(out) == [item.key for item in INPUTS]
    write(out)
    assert len(plain_keys(out)) == 5


def test_failed_rows_that_are_scored_again_make_way_and_others_stay(out):
    write(out)
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST, retry=["crashed"]) as table:
        assert len(table.done) == 5
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST, retry=["unreadable"]) as table:
        assert table.done == {"key0", "key2", "key4"}
        assert plain_keys(out) == [item.key for item in INPUTS], "nothing goes before something else can come"
        (shard,) = shards(INPUTS[1:2])
        table.make_way(shard)
        assert plain_keys(out) == ["key0", "key2", "key3", "key4"]
        table.write(shard, [row(0) | {"input_key": "key1"}])

    assert keys(out) == [item.key for item in INPUTS]
    assert read_scores(out)["status"].to_pylist() == ["ok", "ok", "ok", "error", "ok"]


def test_failed_rows_of_one_shard_make_way_one_after_the_other(out):
    failing = [row(1) | {"input_key": item.key} for item in INPUTS]
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        table.write(make_shard(PLAN.run_id, INPUTS), failing)
        table.write_index(index_of(INPUTS), partial=False)
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST, retry=["unreadable"]) as table:
        for shard in shards():
            table.make_way(shard)
            assert not {item.key for item in shard.inputs} & set(plain_keys(out))
            table.write(shard, [row(0) | {"input_key": item.key} for item in shard.inputs])

    assert read_scores(out)["status"].to_pylist() == ["ok"] * 5
    assert len(plain_keys(out)) == 5


def test_a_part_of_a_list_that_was_never_gone_through_leaves_the_rows_that_are_there(out):
    write(out, count=2)
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        table.write_index(index_of((INPUTS[3],)), partial=True)
        assert table.settle(1) == 0

    assert keys(out) == ["key3", "key0", "key1", "key2"]


def test_a_part_of_a_list_leaves_rows_that_the_list_before_did_not_have(out):
    """A longer list was begun, and its run ended before it was gone through."""
    write(out, inputs=INPUTS[:2])
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        table.write(SHARDS[1], [row(2), row(3)])
        replaced = INPUTS[2]._replace(key="newer")
        table.write(make_shard(PLAN.run_id, [replaced]), [row(2) | {"input_key": "newer"}])
        table.write(make_shard(PLAN.run_id, [INPUTS[3]]), [row(3)])  # as when a kill came between two steps
        table.write_index(index_of((replaced,)), partial=True)
        assert table.settle(1) == 2, "the row of the file that was replaced, and the one that was there twice"

    assert keys(out) == ["newer", "key0", "key1", "key3"]


def test_a_row_that_is_gone_when_all_are_scored_is_an_error_and_nothing_is_dropped(out):
    """Somebody removes files from the folder, or moves it, while a run writes there."""
    write(out)
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        (out / SHARDS[0].name).unlink()
        table.write_index(index_of(INPUTS[:3]), partial=False)
        with pytest.raises(DataError, match=r"lacks 2 of 3 rows that were scored"):
            table.settle(3)

    assert plain_keys(out) == ["key2", "key3", "key4"]
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        for path in out.glob("part-*"):
            path.unlink()
        with pytest.raises(DataError, match="lacks 3 of 3"):
            table.settle(3)


def test_what_is_there_is_told_whole_whatever_the_list_that_was_gone_through_last(out):
    write(out, inputs=INPUTS[:2])
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        table.write(SHARDS[1], [row(2), row(3)])
        table.write(make_shard(PLAN.run_id, INPUTS[1:2]), [row(1)])  # as when a kill came between two steps

    found = read_present(out, columns=["uri"])
    assert (found.rows.num_rows, found.listed, found.others) == (2, 2, 2)
    assert found.state == (
        "complete; 2 more rows are of inputs that the list which was gone through last does not have"
    )
    (out / INDEX_FILE).unlink()
    found = read_present(out, columns=["uri"])
    assert found.rows["uri"].to_pylist() == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"], "none twice"
    assert found.state == "not finished: 4 rows"


def test_a_disk_that_is_full_when_rows_are_to_be_dropped_costs_no_other_row(out, monkeypatch):
    write(out)

    def refuse(self, name, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
        table.write_index(index_of(INPUTS[1:]), partial=False)
        monkeypatch.setattr(FolderStore, "write", refuse)
        with pytest.raises(OSError, match="No space left"):
            table.settle(4)

    assert plain_keys(out) == [item.key for item in INPUTS]
