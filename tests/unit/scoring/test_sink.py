from __future__ import annotations

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

from ivdr_deploy.cli._describe import describe
from ivdr_deploy.errors import ArtifactError, DataError, FolderError
from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.scoring.shard import METADATA_KEY
from ivdr_deploy.scoring.sink import LEDGER_FILE, open_sink, read_ledger, read_scores
from ivdr_deploy.spec import ViewPlan

PLAN = RunPlan(
    ivdr_version="0.1.0",
    videos=5,
    videos_sha256="aa",
    model="tiny",
    model_version="1.0",
    model_sha256="bb",
    variant="onnx-fp32",
    runtime="onnxruntime 1.32.0, CPUExecutionProvider, fp32",
    contract_hash="cc",
    view_plan=ViewPlan(num_clips=1),
    top_k=2,
    outputs=("feature", "intra"),
    hash_files=False,
    decoder="pyav",
    shard_videos=2,
)
MANIFEST = {"name": "tiny", "labels": ["sit", "stand"]}


def row(position: int) -> dict[str, object]:
    """Odd positions failed."""
    base = {
        "position": position,
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


def write(folder: Path, *, plan: RunPlan = PLAN, shards: int | None = None) -> None:
    """Commit the first ``shards`` absent shards; all of them by default."""
    with open_sink(folder, plan, manifest=MANIFEST) as sink:
        for shard in sink.pending[:shards]:
            sink.write(shard, [row(position) for position in range(shard.start, shard.stop)])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_table_has_every_row_once_in_input_order(out):
    write(out)

    rows = read_scores(out).to_pylist()

    assert [entry["position"] for entry in rows] == [0, 1, 2, 3, 4]
    for position, entry in enumerate(rows):
        expected = row(position)
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


def test_pending_shards_are_those_that_are_absent(out):
    write(out, shards=1)

    with open_sink(out, PLAN, manifest=MANIFEST) as sink:
        assert sink.pending == PLAN.shards[1:]
        assert sink.outcomes() == {"ok": 1, "unreadable": 1}


def test_a_written_shard_is_never_touched_again(out):
    write(out, shards=2)
    before = {path: path.stat() for path in out.glob("*.parquet")}

    write(out)

    assert len(before) == 2
    for path, stat in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_rows_of_another_place_are_not_written(out):
    with open_sink(out, PLAN, manifest=MANIFEST) as sink, pytest.raises(AssertionError):
        sink.write(PLAN.shards[0], [row(0)])

    assert not list(out.glob("*.parquet"))


def test_what_a_killed_writer_left_is_removed(out):
    write(out, shards=1)
    half_written = out / f".{PLAN.shards[1].name}.0123456789abcdef.tmp"
    half_written.mkdir()
    (half_written / PLAN.shards[1].name).write_bytes(b"PAR1")

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
    write(out, shards=1)

    with (
        pytest.raises(FolderError, match=r"another run.*model_sha256: bb, not other") as caught,
        open_sink(out, replace(PLAN, model_sha256="other"), manifest=MANIFEST),
    ):
        pass
    assert "choose another folder" in caught.value.hint


def test_a_run_that_wrote_nothing_gives_its_folder_up(out):
    write(out, shards=0)
    other = replace(PLAN, top_k=1)

    write(out, plan=other, shards=0)

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
    write(out, shards=1)
    (out / PLAN.shards[1].name).write_bytes(b"garbage")

    with pytest.raises(DataError, match=f"{PLAN.shards[1].name} is damaged") as caught:
        write(out)
    assert "delete it" in caught.value.hint


def test_a_shard_under_the_name_of_another_is_refused(out):
    write(out)
    shutil.copyfile(out / PLAN.shards[0].name, out / PLAN.shards[1].name)

    with pytest.raises(DataError, match="expected rows 2 to 3"):
        read_scores(out)


def test_a_changed_byte_in_a_shard_is_noticed(out):
    write(out)
    path = out / PLAN.shards[0].name
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(2)
    assert column.path_in_schema == "uri"
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(DataError, match="is damaged"):
        read_scores(out)


def test_an_unfinished_table_is_not_read(out):
    write(out, shards=2)

    with pytest.raises(DataError, match="not finished: it lacks 1 of 5 rows") as caught:
        read_scores(out)
    assert "run the same `ivdr score` command" in caught.value.hint


def test_a_folder_that_is_no_score_table_is_not_read(tmp_path):
    with pytest.raises(DataError, match="is no score table"):
        read_scores(tmp_path)


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_table_of_another_version_is_refused_by_its_version(out, version):
    write(out)
    ledger = out / LEDGER_FILE
    values = json.loads(ledger.read_text())
    values["plan"]["table_version"] = version
    values["plan"]["num_clips"] = 10  # a setting that this version does not have
    ledger.write_text(json.dumps(values))

    for use in (read_scores, write):
        with pytest.raises(DataError, match=f"of version {version}, this ivdr reads and continues version 3"):
            use(out)


def test_whatever_is_in_a_ledger_it_is_read_or_refused(out):
    write(out)
    ledger = out / LEDGER_FILE
    data, values = ledger.read_bytes(), json.loads(ledger.read_text())
    whole = read_ledger(out)
    for seed in range(200):
        ledger.write_bytes(damaged_bytes(data, seed))
        with suppress(DataError):
            assert replace(read_ledger(out), started_at=whole.started_at) == whole
        ledger.write_text(dumped(damaged_json(values, seed)))
        with suppress(DataError):
            assert replace(read_ledger(out), started_at=whole.started_at) == whole
    for text in ("[" * 100_000, '{"plan":' * 100_000, "[]", "", "9" * 10_000):
        ledger.write_text(text)
        with pytest.raises(DataError):
            read_ledger(out)


def test_whatever_is_in_a_shard_it_is_shown_or_refused(out):
    write(out)
    path = out / PLAN.shards[0].name
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
        open_sink(out, PLAN, manifest=MANIFEST),
        pytest.raises(FolderError, match="another process is writing"),
        open_sink(out, PLAN, manifest=MANIFEST),
    ):
        pass


def test_the_name_of_a_folder_adds_no_column(tmp_path):
    out = tmp_path / "day=3" / "out"
    write(out)

    assert "day" not in read_scores(out).column_names


def test_a_table_that_a_killed_writer_left_is_called_unfinished_and_not_foreign(out):
    write(out, shards=2)
    left = out / f".{PLAN.shards[2].name}.0123456789abcdef.tmp"
    left.mkdir()
    (left / PLAN.shards[2].name).write_bytes(b"PAR1")

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
    path = out / PLAN.shards[0].name
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
from test_sink import PLAN, MANIFEST, open_sink, row
from ivdr_deploy._console import exiting

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with exiting("ivdr"), open_sink(Path({str(out)!r}), PLAN, manifest=MANIFEST) as sink:
    for shard in sink.pending:
        sink.write(shard, [row(position) for position in range(shard.start, shard.stop)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (9, f"ivdr: {out}: File too large\n")
    assert sorted(path.name for path in out.iterdir()) == ["_run.json", "_run.lock", PLAN.shards[0].name]
    write(out)
    assert read_scores(out).num_rows == 5


def test_a_shard_that_takes_more_memory_than_there_is_is_not_called_damaged(out):
    """A damaged one may claim any length, so the hint names both."""
    code = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
import numpy as np, psutil
from pathlib import Path
from test_sink import PLAN, MANIFEST, open_sink, read_scores, row
from ivdr_deploy._console import exiting

out, vector = Path({str(out)!r}), np.arange(1 << 22, dtype=np.float32)
with open_sink(out, PLAN, manifest=MANIFEST) as sink:
    for shard in sink.pending:
        wide = [row(place) for place in range(shard.start, shard.stop)]
        wide = [one | {{"feature": vector}} if "feature" in one else one for one in wide]
        sink.write(shard, wide)
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
