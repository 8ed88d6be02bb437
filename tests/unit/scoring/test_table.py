from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import run_plans
from damage import damaged_bytes, damaged_json, dumped

from ivdr_deploy.artifacts.kinds import SCORE_LEDGER_FILE as LEDGER_FILE
from ivdr_deploy.cli._describe import describe
from ivdr_deploy.errors import ArtifactError, DataError, FolderError
from ivdr_deploy.scoring.index import INDEX_FILE, Index
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.ledger import read_ledger
from ivdr_deploy.scoring.plan import TABLE_VERSION, RunPlan
from ivdr_deploy.scoring.shard import METADATA_KEY, Shard, make_shard
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table, read_scores
from ivdr_deploy.spec import ViewPlan

PLAN = replace(run_plans.PLAN, view_plan=ViewPlan(num_clips=1), outputs=("feature", "intra"))
MANIFEST = {"name": "tiny", "labels": ["sit", "stand"]}


INPUTS = tuple(
    Input(position, f"{position}.mp4", None, f"id{position}", f"key{position}", f"/{position}.mp4")
    for position in range(5)
)


def row(position: int) -> dict[str, object]:
    """Odd positions failed."""
    base = {
        "input_key": f"key{position}",
        "video_id": f"id{position}",
        "uri": f"{position}.mp4",
        "model": "tiny",
        "model_version": "1.0",
        "variant": "onnx-fp32",
        "contract_hash": "cc",
        "view_plan": "1 clip, centre crop",
        "run_id": PLAN.run_id,
    }
    if position % 2:
        return base | {"status": "error", "error_code": "unreadable", "error_message": "no"}
    vectors = {"feature": [0.5, float(position)], "intra": [[[1.0, 0.0], [0.0, 1.0]]]}
    return base | vectors | {"status": "ok", "labels": ["sit", "stand"], "scores": [0.75, 0.25]}


def shards(inputs: tuple[Input, ...] = INPUTS, plan: RunPlan = PLAN, size: int = 2) -> list[Shard]:
    return [make_shard(plan.run_id, inputs[start : start + size]) for start in range(0, len(inputs), size)]


SHARDS = shards()


def index_of(inputs: tuple[Input, ...]) -> Index:
    index = Index()
    index.add(inputs)
    return index


def write(
    folder: Path, *, plan: RunPlan = PLAN, count: int | None = None, inputs: tuple[Input, ...] = INPUTS
) -> int:
    """Score what is absent of some inputs, the first ``count`` shards of it; all by default, with the index."""
    with open_table(FolderStore(folder), plan, manifest=MANIFEST) as table:
        absent = tuple(item for item in inputs if item.key not in table.done)
        for shard in shards(absent, plan)[:count]:
            table.write(shard, [row(int(item.video_id[2:])) | {"label": item.label} for item in shard.inputs])
        if count is None:
            table.write_index(index_of(inputs), partial=False)
            table.settle()
    return len(absent)


def ledger_of(folder: Path) -> object:
    return read_ledger(FolderStore(folder))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


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


def test_what_a_killed_writer_left_is_removed(out):
    write(out, count=1)
    half_written = out / f".{SHARDS[1].name}.0123456789abcdef.tmp"
    half_written.mkdir()
    (half_written / SHARDS[1].name).write_bytes(b"PAR1")

    write(out)

    assert not half_written.exists()
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


def test_a_run_that_wrote_nothing_gives_its_folder_up(out):
    write(out, count=0)
    other = replace(PLAN, top_k=1)

    write(out, plan=other, count=0)

    assert json.loads((out / LEDGER_FILE).read_text())["run_id"] == other.run_id


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


def test_two_writers_at_once_are_refused(out):
    with (
        open_table(FolderStore(out), PLAN, manifest=MANIFEST),
        pytest.raises(FolderError, match="another process is writing"),
        open_table(FolderStore(out), PLAN, manifest=MANIFEST),
    ):
        pass


def test_the_name_of_a_folder_adds_no_column(tmp_path):
    out = tmp_path / "day=3" / "out"
    write(out)

    assert "day" not in read_scores(out).column_names


def test_a_table_that_a_killed_writer_left_is_called_unfinished_and_not_foreign(out):
    write(out, count=2)
    left = out / f".{SHARDS[2].name}.0123456789abcdef.tmp"
    left.mkdir()
    (left / SHARDS[2].name).write_bytes(b"PAR1")

    with pytest.raises(DataError, match="not finished"):
        read_scores(out)


def test_a_folder_whose_name_reads_like_a_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    write(Path("scores:1"))

    assert read_scores("scores:1").num_rows == 5


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


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
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
from pathlib import Path
from test_table import PLAN, MANIFEST, SHARDS, FolderStore, open_table, row
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
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
import numpy as np, psutil
from pathlib import Path
from test_table import *
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


def keys(folder: Path) -> list[str]:
    return read_scores(folder)["input_key"].to_pylist()


def plain_keys(folder: Path) -> list[str]:
    """What a common reader finds."""
    return sorted(pq.read_table(folder, columns=["input_key"])["input_key"].to_pylist())


def test_a_list_that_grew_and_changed_its_order_keeps_its_rows(out):
    write(out, inputs=INPUTS[:3])
    before = {path.name: path.stat().st_ino for path in out.glob("part-*")}

    mixed = tuple(item._replace(position=place) for place, item in enumerate(INPUTS[::-1]))
    assert write(out, inputs=mixed) == 2

    assert keys(out) == ["key4", "key3", "key2", "key1", "key0"]
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
        assert table.settle() == 1

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
        assert table.settle() == 0

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


def test_failed_rows_can_be_dropped_to_be_scored_again(out):
    write(out)
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST, retry=["crashed"]) as table:
        assert len(table.done) == 5
    with open_table(FolderStore(out), PLAN, manifest=MANIFEST, retry=["unreadable"]) as table:
        assert table.done == {"key0", "key2", "key4"}
    with pytest.raises(DataError, match="it lacks 2 of 5 rows"):
        read_scores(out)

    assert write(out) == 2
    assert keys(out) == [item.key for item in INPUTS]


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


def test_a_folder_that_may_not_be_written_is_named_and_loses_nothing(tmp_path):
    top = tmp_path / "shared"
    top.mkdir()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    write(top / "out", count=1)
    with without_rights(), pytest.raises(PermissionError) as caught:
        write(top / "out")
    assert str(top / "out") in str(caught.value.filename)

    assert write(top / "out") == 3
    assert keys(top / "out") == [item.key for item in INPUTS]


@contextmanager
def without_rights() -> Iterator[None]:
    """Let go of the right to write everywhere, which root has."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    else:
        pytest.skip("only root can be somebody else")
    try:
        yield
    finally:
        os.seteuid(user)
