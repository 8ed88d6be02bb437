"""Kills scoring runs with SIGKILL at random moments, and counts what that lost or doubled."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from examples.demo.figures import make_figures
from ivdr_deploy._console import console
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.scoring.shard import SHARD_NAME

TIMINGS = ["decode_ms", "preprocess_ms", "infer_ms"]
SHARDS = 40


@dataclass
class Kills:
    """What a number of kills did."""

    kills: int = 0
    lost: int = 0
    """Inputs without a row, or with another row than in a run that was left alone, at the end of any series."""

    duplicated: int = 0
    redone_shards_max: int = 0
    """Shards that were begun and not there at a kill."""


def make_list(folder: Path) -> Path:
    """Make a list for ``SHARDS`` shards."""
    folder.mkdir(parents=True)
    make_figures(folder / "made", train_actors=1, test_actors=1)
    return write_list(folder, sorted((folder / "made").rglob("*.mp4"))[:3], count=32 * SHARDS)


def write_list(folder: Path, kinds: Sequence[Path], *, count: int) -> Path:
    """Write a labelled list of many small files, every fourth of them a video: a bad one is quick, and a row as well.

    Args:
        folder: Where list and files go.
        kinds: The videos that are copied.
        count: How many files.
    """
    lines = ["path,label"]
    for index in range(count):
        path = folder / f"{index:05d}.mp4"
        if index % 4 == 0:
            shutil.copyfile(kinds[index % len(kinds)], path)
        else:
            path.write_bytes(b"no video")
        lines.append(f"{path.name},class{index % 7}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def start(
    bundle: Path, videos: Path, out: Path, *, more: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    """Start the real command, with more options and variables of the environment."""
    words = ["score", str(bundle), str(videos), "-o", str(out), "--json", *more]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the end; some inputs are bad, so that the exit code is 1."""
    output, errors = process.communicate(timeout=600)
    if process.returncode != 1:
        raise RuntimeError(f"the run ended with {process.returncode}: {errors}")
    return dict(json.loads(output))


def shards(out: Path) -> dict[str, tuple[int, int]]:
    """Return the committed shards, with what changes when one is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("part-*")}


def compare(whole: Any, out: Path, found: Kills) -> None:
    """Hold a table that was killed over and over against one that was not."""
    import pyarrow.parquet as pq

    rows = read_scores(out).drop_columns(TIMINGS).to_pylist()
    expected = whole.drop_columns(TIMINGS).to_pylist()
    other = [(row, whole) for row, whole in zip(rows, expected, strict=True) if row != whole]
    for row, _ in other:
        console.print(f"another row: {row['uri']} {row['error_code']} {row['error_message']}", markup=False)
    found.lost += len(other)
    plain = Counter(pq.read_table(out, columns=["input_key"])["input_key"].to_pylist())
    found.duplicated += sum(count - 1 for count in plain.values())


def score_whole(bundle: Path, videos: Path, scratch: Path) -> float:
    """Score once without a kill, into ``scratch / "whole"``; returns the seconds that took."""
    return float(finish(start(bundle, videos, scratch / "whole"))["seconds"])


def kill_command(
    bundle: Path,
    videos: Path,
    scratch: Path,
    *,
    kills: int,
    seconds: float,
    seed: int,
    more: Sequence[str] = (),
) -> Kills:
    """Kill the command so often; whenever a table is whole, the next series begins with an empty folder.

    Args:
        bundle: What scores.
        videos: See ``make_list``.
        scratch: Where ``score_whole`` was.
        kills: How many.
        seconds: Of a whole run.
        seed: Of the moments.
        more: Options of the command.
    """
    found, moments = Kills(), random.Random(seed)
    whole = read_scores(scratch / "whole")
    series = 0
    while found.kills < kills:
        out, series = scratch / f"series{series}{''.join(more)}", series + 1
        while len(shards(out)) < SHARDS and found.kills < kills:
            before, process = shards(out), start(bundle, videos, out, more=more)
            pause = moments.uniform(0, 0.3 * seconds) + moments.choice((0.0, 2.0))
            if not killed(process, (out / "_run.lock").exists, pause):
                continue  # it was done before: that is no kill
            kept = shards(out)
            if len(kept) == SHARDS:
                continue  # no work was outstanding
            found.kills += 1
            found.lost += len(before.items() - kept.items())
            found.redone_shards_max = max(found.redone_shards_max, _begun(out))
            console.print(f"kill {found.kills}: {len(kept)} of {SHARDS} shards", markup=False)
        finish(start(bundle, videos, out))
        compare(whole, out, found)
        shutil.rmtree(out)
    return found


def _begun(out: Path) -> int:
    """Count the shards that are noted as begun, and are not there; the note of one may outlive a kill just after it."""
    there = {match["digest"] for match in map(SHARD_NAME.fullmatch, shards(out)) if match}
    return sum(path.stem.removeprefix("_attempt-") not in there for path in out.glob("_attempt-*"))


def killed(process: subprocess.Popen[str], begun: Callable[[], object], pause: float) -> bool:
    """Kill a process so long after it has begun, and wait for all that it started; False if it ended by itself."""
    try:
        others = _family(process)
        if wait_until(process, begun) and wait_until(process, past(time.monotonic() + pause)):
            others = _family(process)
            process.send_signal(signal.SIGKILL)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    _, left = psutil.wait_procs(others, timeout=60)
    if left := [one for one in left if _may_write(one)]:  # an agent calls itself one only when it has started
        named = ", ".join(" ".join(command(one))[:80] for one in left)
        raise RuntimeError(f"{len(left)} processes of a killed run are still there after a minute: {named}")
    return process.returncode == -signal.SIGKILL


def wait_until(process: subprocess.Popen[str], condition: Callable[[], object]) -> bool:
    """Wait for a condition; False if the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return what a process started and may write."""
    return [one for one in psutil.Process(process.pid).children(recursive=True) if _may_write(one)]


def _may_write(process: psutil.Process) -> bool:
    """Whether a process is no agent of a Ray node, which only finds out that the node ended."""
    return not "".join(command(process)[:1]).rstrip().endswith("Agent")


def command(process: psutil.Process) -> list[str]:
    """Return the command line of a process; nothing of one that has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def past(moment: float) -> Callable[[], bool]:
    """Return a condition: the monotonic clock is there."""
    return lambda: time.monotonic() >= moment


def as_json(found: Kills) -> dict[str, int]:
    """Return the figures by name."""
    return asdict(found)
