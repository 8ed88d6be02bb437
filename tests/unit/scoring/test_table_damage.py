"""Files of a table that are not what was written, and a machine that has no room for them."""

from __future__ import annotations

import errno
import io
import json
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from damage import damaged_bytes, damaged_json, dumped
from score_tables import INPUTS, PLAN, SHARDS, flipped, index_of, keys, write

from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.cli._describe import describe
from ivdr_deploy.datasets.entries import LeftOut
from ivdr_deploy.errors import ArtifactError, DataError, FolderError
from ivdr_deploy.scoring.index import INDEX_FILE, read_index, write_index
from ivdr_deploy.scoring.ledger import read_ledger
from ivdr_deploy.scoring.reader import read_present, read_scores
from ivdr_deploy.scoring.shard import METADATA_KEY
from ivdr_deploy.scoring.store import FolderStore


def ledger_of(folder: Path) -> object:
    return read_ledger(FolderStore(folder))


def test_garbage_under_the_name_of_a_shard_is_refused(out):
    write(out, count=1)
    (out / SHARDS[1].name).write_bytes(b"garbage")

    with pytest.raises(DataError, match=f"{SHARDS[1].name} is damaged") as caught:
        write(out)
    assert "delete it" in caught.value.hint


def test_a_shard_under_the_name_of_another_is_refused(out):
    write(out)
    shutil.copyfile(out / SHARDS[0].name, out / SHARDS[1].name)

    with pytest.raises(DataError, match="expected those that its name stands for"):
        read_scores(out)


def test_a_changed_byte_in_a_shard_is_noticed(out):
    write(out)
    path = out / SHARDS[0].name
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(2)
    assert column.path_in_schema == "uri"
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(DataError, match="is damaged"):
        read_scores(out)


def test_whatever_is_in_a_ledger_it_is_read_or_refused(out):
    write(out)
    ledger = out / LEDGER_FILE
    data, values = ledger.read_bytes(), json.loads(ledger.read_text())
    whole = ledger_of(out)
    for seed in range(200):
        ledger.write_bytes(damaged_bytes(data, seed))
        with suppress(DataError):
            assert replace(ledger_of(out), started_at=whole.started_at) == whole
        ledger.write_text(dumped(damaged_json(values, seed)))
        with suppress(DataError):
            assert replace(ledger_of(out), started_at=whole.started_at) == whole
    for text in ("[" * 100_000, '{"plan":' * 100_000, "[]", "", "9" * 10_000):
        ledger.write_text(text)
        with pytest.raises(DataError):
            ledger_of(out)


def test_whatever_is_in_a_shard_it_is_shown_or_refused(out):
    write(out)
    path = out / SHARDS[0].name
    data, table = path.read_bytes(), pq.read_table(path)
    for seed in range(100):
        path.write_bytes(damaged_bytes(data, seed))
        with suppress(ArtifactError):
            describe(path)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: b"[1]"}), path)
    with pytest.raises(ArtifactError):
        describe(path)


@pytest.mark.parametrize("damage", [("{", ""), ('"top_k": 2', '"top_k": 3'), ('"plan"', '"plans"')])
def test_a_damaged_ledger_is_refused(out, damage):
    write(out)
    ledger = out / LEDGER_FILE
    ledger.write_text(ledger.read_text().replace(*damage, 1))

    with pytest.raises(DataError, match=r"is damaged|was changed"):
        read_scores(out)


def test_what_resuming_calls_complete_is_what_reading_reads_whatever_bit_is_flipped(out):
    write(out)
    whole = read_scores(out)
    path = out / SHARDS[0].name
    content = path.read_bytes()
    name = content.rindex(b"error_code") * 8  # of a column, in the footer
    bits = random.Random(33).sample(range(8 * len(content)), 150)
    refused = 0
    for bit in [name, *bits]:
        path.write_bytes(flipped(content, bit))
        try:  # any other exception is a failure of this test
            table = read_scores(out)
        except DataError:
            table = None
        if table is None:
            refused += 1
            with pytest.raises(DataError, match="is damaged"):
                write(out)
        else:
            write(out)  # there is nothing to do
            assert table.equals(whole, check_metadata=True), f"bit {bit}"
    assert refused > 50


def test_rows_that_need_more_space_than_there_is_leave_the_shards_before_them(out):
    code = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
from pathlib import Path
from score_tables import PLAN, MANIFEST, SHARDS, FolderStore, open_table, row
from ivdr_deploy._console import exiting

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with exiting("ivdr"), open_table(FolderStore(Path({str(out)!r})), PLAN, manifest=MANIFEST) as table:
    for shard in SHARDS:
        table.write(shard, [row(item.position) for item in shard.inputs])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (9, f"ivdr: {out}: File too large\n")
    assert sorted(path.name for path in out.iterdir()) == ["_run.json", "_run.lock", SHARDS[0].name]
    write(out)
    assert read_scores(out).num_rows == 5


def test_a_shard_that_takes_more_memory_than_there_is_is_not_called_damaged(out):
    """A damaged one may claim any length, so the hint names both."""
    code = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
import numpy as np, psutil
from pathlib import Path
from score_tables import *
from ivdr_deploy._console import exiting

out, vector = Path({str(out)!r}), np.arange(1 << 22, dtype=np.float32)
with open_table(FolderStore(out), PLAN, manifest=MANIFEST) as table:
    for shard in SHARDS:
        wide = [row(item.position) for item in shard.inputs]
        wide = [one | {{"feature": vector}} if "feature" in one else one for one in wide]
        table.write(shard, wide)
    table.write_index(index_of(INPUTS), partial=False)
del wide
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used, used))
with exiting("ivdr"):
    read_scores(out)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 3, done.stderr
    assert "cannot be read: it asks for more memory than there is" in done.stderr
    assert "ulimit -v" in done.stderr
    assert "delete it" in done.stderr
    assert read_scores(out).num_rows == 5


def test_a_ledger_that_is_gone_is_written_again_and_one_that_is_cut_off_can_be_deleted(out):
    write(out)
    ledger = out / LEDGER_FILE
    ledger.write_bytes(ledger.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged") as caught:
        write(out)
    assert f"delete {ledger}" in caught.value.hint
    ledger.unlink()

    with pytest.raises(FolderError, match="another run"):
        write(out, plan=replace(PLAN, top_k=1))
    assert write(out) == 0
    assert keys(out) == [item.key for item in INPUTS]


def test_whatever_bit_of_the_index_is_flipped_it_is_read_or_refused(out):
    write(out, inputs=tuple(item._replace(label=f"class {item.position}") for item in INPUTS))
    whole, path = read_scores(out), out / INDEX_FILE
    content, refused = path.read_bytes(), 0
    for bit in random.Random(5).sample(range(8 * len(content)), 150):
        path.write_bytes(flipped(content, bit))
        try:
            assert read_scores(out).equals(whole, check_metadata=True), f"bit {bit}"
        except DataError as error:
            refused += 1
            assert "delete it" in error.hint  # noqa: PT017
    assert refused > 50
    path.unlink()
    assert write(out, inputs=tuple(item._replace(label=f"class {item.position}") for item in INPUTS)) == 0
    assert read_scores(out).equals(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", [[]]])
def test_whatever_value_a_setting_of_the_ledger_has_it_is_refused(out, value):
    write(out)
    ledger = out / LEDGER_FILE
    values = json.loads(ledger.read_text())
    values["plan"]["limits"] = {"max_bytes": value}
    ledger.write_text(json.dumps(values))

    with pytest.raises(DataError, match=r"is damaged|was changed") as caught:
        read_scores(out)
    assert "delete" in caught.value.hint


@pytest.mark.parametrize("said", [None, {}, {"plan": 5}, {"plan": {"top_k": "x" * 10_000}}, {"plan": None}])
def test_a_shard_that_does_not_say_its_run_is_damaged_where_the_ledger_is_gone(out, said):
    write(out, count=1)
    (out / LEDGER_FILE).unlink()
    path = out / SHARDS[0].name
    metadata = None if said is None else {METADATA_KEY: json.dumps(said).encode()}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)

    with pytest.raises(DataError, match=f"{SHARDS[0].name} is damaged") as caught:
        write(out)
    assert len(str(caught.value)) < 1000


class Refusing(io.BytesIO):
    """A file on a disk that does not answer."""

    def read(self, *_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    readinto = read


@pytest.mark.parametrize("name", [SHARDS[0].name, INDEX_FILE])
def test_a_file_that_the_disk_does_not_give_is_not_called_damaged(out, monkeypatch, name):
    """Whoever deletes it as the error says would lose what a second try may read."""
    write(out)
    opened = FolderStore.open
    monkeypatch.setattr(
        FolderStore, "open", lambda self, one: Refusing(bytes(1000)) if one == name else opened(self, one)
    )

    with pytest.raises(OSError, match="Input/output error") as caught:
        read_scores(out)
    assert caught.value.filename == str(out / name)


def test_what_the_list_passed_over_is_in_the_index_and_a_change_of_it_is_noticed(out):
    index = index_of(INPUTS)
    unread = LeftOut("folders that cannot be read", 1, ("a",), unread=True)
    index.left_out = (LeftOut("hidden", 2, (".a.mp4", ".b\ud800.mp4")), unread)
    write(out)
    store = FolderStore(out)
    write_index(store, PLAN, index)
    entry, second = read_index(store, PLAN).left_out
    assert (entry.unread, second) == (False, unread)
    assert not read_present(out, columns=["uri"]).complete
    assert str(entry).startswith("2 hidden: .a.mp4, .b")
    table = pq.read_table(out / INDEX_FILE)
    changed = table.schema.metadata[b"ivdr"].replace(b'"hidden", 2', b'"hidden", 0')
    assert changed != table.schema.metadata[b"ivdr"]
    pq.write_table(table.replace_schema_metadata({b"ivdr": changed}), out / INDEX_FILE)
    with pytest.raises(DataError, match="is not what was written"):
        read_index(store, PLAN)
