"""Scoring survives SIGKILL: whatever the moment, each input ends up in exactly one row."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from videos import numbered_video

from examples.scoring import kills
from examples.scoring.kills import TIMINGS, finish, shards, write_list
from ivdr_deploy.scoring import read_scores

KILLS = 5
SHARDS = 18
"""More than they can let through: each waits for two more at most, and for the time that one takes."""

VIDEOS = 32 * SHARDS

GOOD = VIDEOS // 4


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled list of many small files. Every fourth is a video; the others are bad, which is quick."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = [
        numbered_video(folder / f"kind{index}.mp4", num_frames=frames, size=(48, 36))
        for index, frames in enumerate((3, 8, 13))
    ]
    return write_list(folder, kinds, count=VIDEOS)


start = partial(kills.start, more=("--output", "inter"))


def half_written(out: Path) -> int:
    """Count the temporary files of shards."""
    return len(list(out.glob(".part-*.tmp")))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the scorer ended before it could be killed: {process.communicate()}"
        assert time.monotonic() < deadline, "the scorer made no progress"
        time.sleep(0.002)


def holds_folder(process: subprocess.Popen[str], out: Path) -> bool:
    """Whether a scorer has come as far as claiming its folder."""
    try:
        return any(path.resolve() == out / "_run.lock" for path in Path(f"/proc/{process.pid}/fd").iterdir())
    except OSError:  # the process, or a file it had open, is gone
        return False


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a scorer, and show that it was alive until then."""
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def wait_for_shards(process: subprocess.Popen[str], out: Path, *, wanted: int, pause: float) -> None:
    """Wait until so many shards are there, and some seconds more."""
    wait_for(lambda: len(shards(out)) >= wanted, process)
    end = time.monotonic() + pause
    wait_for(lambda: time.monotonic() >= end, process)


def wait_for_a_write(process: subprocess.Popen[str], out: Path, *, have: int) -> None:
    """Wait until a shard is on its way to the disk. That may be missed, but not for ever."""
    wait_for(lambda: half_written(out) or len(shards(out)) >= have + 3, process)


@pytest.mark.slow
def test_each_input_has_exactly_one_row_after_five_kills(tiny_bundle, videos, tmp_path):
    summary = finish(start(tiny_bundle, videos, tmp_path / "whole"))
    whole = read_scores(tmp_path / "whole")
    out, seed = tmp_path / "out", random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    print(f"the moments of the kills come from the seed {seed}")
    committed: dict[str, tuple[int, int]] = {}

    for number in range(KILLS):
        process = start(tiny_bundle, videos, out)
        if number:
            wait_for(lambda: holds_folder(process, out), process)  # noqa: B023  (used at once)
        if number in (2, 3):
            wait_for_a_write(process, out, have=len(committed))
        else:
            # The first is killed while it starts; past half of the way, none may go much further.
            more = moments.randrange(3) if number and len(committed) < SHARDS // 2 else 0
            more = max(more, 1) if number == KILLS - 1 else more
            pause = moments.uniform(0, summary["seconds"] / SHARDS)
            wait_for_shards(process, out, wanted=len(committed) + more, pause=pause)
        kill(process)
        kept = shards(out) if out.exists() else {}
        assert committed.items() <= kept.items(), "a committed shard was lost or written again"
        assert len(kept) < SHARDS, "there was no work outstanding"
        print(f"kill {number}: {len(kept)} shards, {half_written(out)} half-written files")
        committed = kept

    assert committed, "no killed run got anywhere"
    resumed = finish(start(tiny_bundle, videos, out))

    table = read_scores(out)
    assert table["position"].to_pylist() == list(range(VIDEOS))
    assert table["uri"].to_pylist() == [line.split(",")[0] for line in videos.read_text().splitlines()[1:]]
    assert table.drop_columns(TIMINGS).equals(whole.drop_columns(TIMINGS))
    assert committed.items() <= shards(out).items()
    assert not list(out.glob(".*"))
    assert resumed["scored"] == VIDEOS - 32 * len(committed)
    assert (
        (resumed["ok"], resumed["errors"])
        == (summary["ok"], summary["errors"])
        == (GOOD, {"unreadable": VIDEOS - GOOD})
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_run_that_is_asked_to_stop_says_so_and_goes_on_later(
    tiny_bundle, videos, tmp_path, number, code, said
):
    out = tmp_path / "out"
    lines = videos.read_text().splitlines()
    videos = videos.with_name("twice.csv")
    videos.write_text("\n".join([*lines, lines[1]]))
    process = start(tiny_bundle, videos, out)
    wait_for(lambda: len(shards(out)) >= 2, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)

    assert (process.returncode, output) == (code, "")
    wish, passed_over, stopped, last = errors.splitlines()[-4:]
    assert passed_over == f"left out: 1 repeated: {lines[1].split(',')[0]}"
    assert wish == "stopping when the shard in work is scored"
    assert stopped == f"stopped: the rows that are in {out} stay, and the same command goes on from there"
    assert last == f"ivdr: {said}"
    kept = shards(out)
    assert 2 <= len(kept) < SHARDS
    assert not half_written(out)
    assert finish(start(tiny_bundle, videos, out))["scored"] == VIDEOS - 32 * len(kept)
    assert kept.items() <= shards(out).items()
    assert read_scores(out).num_rows == VIDEOS


MEMORY_BYTES = 1_700_000_000
"""Address space of the whole run: less than what a hostile file asks for."""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_poisonous_file_among_good_ones_is_a_row_where_memory_is_short(tiny_bundle, shared_data, tmp_path):
    good = numbered_video(tmp_path / "good.mp4", num_frames=8, size=(48, 36))
    for index in range(40):
        shutil.copyfile(good, tmp_path / f"{index:02d}.mp4")
    poison = sorted(path for path in (shared_data / "hostile").iterdir() if path.suffix != ".md")
    names = [*(f"{index:02d}.mp4" for index in range(20)), *map(str, poison)]
    names += [f"{index:02d}.mp4" for index in range(20, 40)]
    (tmp_path / "list.csv").write_text("\n".join(["path", *names]))
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES})); "
    command = limited + "from ivdr_deploy.cli import main; main()"
    arguments = ["score", str(tiny_bundle), str(tmp_path / "list.csv"), "-o", str(tmp_path / "out"), "--json"]
    whole = None
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", command, *arguments, "--variant", "onnx-fp32"],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        table = read_scores(tmp_path / "out").drop_columns(TIMINGS)
        rows = {row["uri"]: row for row in table.to_pylist()}
        assert [name for name in names if rows[name]["status"] == "error"] == [str(path) for path in poison]
        assert whole is None or table.equals(whole)
        whole = table
        (
            tmp_path / "out" / min(shards(tmp_path / "out"))
        ).unlink()  # as if killed before: resuming meets it again
