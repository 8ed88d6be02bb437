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
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from examples.demo.figures import make_figures
from ivdr_deploy._console import console
from ivdr_deploy.scoring import read_scores

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


def start(bundle: Path, videos: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the real command."""
    words = ["score", str(bundle), str(videos), "-o", str(out), "--json", *more]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the end; some inputs are bad, so that the exit code is 1."""
    output, errors = process.communicate(timeout=600)
    if process.returncode != 1:
        raise RuntimeError(f"the run ended with {process.returncode}: {errors}")
    return dict(json.loads(output))


def shards(out: Path) -> dict[str, int]:
    """Return the committed shards, with what changes when one is written again."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}


def compare(whole: Any, out: Path, found: Kills) -> None:
    """Hold a table that was killed over and over against one that was not."""
    import pyarrow.parquet as pq

    rows = read_scores(out).drop_columns(TIMINGS).to_pylist()
    expected = whole.drop_columns(TIMINGS).to_pylist()
    found.lost += sum(row != other for row, other in zip(rows, expected, strict=True))
    plain = Counter(pq.read_table(out, columns=["input_key"])["input_key"].to_pylist())
    found.duplicated += sum(count - 1 for count in plain.values())


def kill_local(bundle: Path, videos: Path, scratch: Path, *, kills: int, seed: int) -> Kills:
    """Kill the command so often; whenever a table is whole, the next series begins with an empty folder."""
    found, moments = Kills(), random.Random(seed)
    seconds = finish(start(bundle, videos, scratch / "whole"))["seconds"]
    whole = read_scores(scratch / "whole")
    series = 0
    while found.kills < kills:
        out, series = scratch / f"series{series}", series + 1
        while len(shards(out)) < SHARDS and found.kills < kills:
            before, process = shards(out), start(bundle, videos, out)
            try:
                hit = wait_until(process, (out / "_run.lock").exists)
                end = time.monotonic() + moments.uniform(0, 0.3 * seconds) + moments.choice((0.0, 2.0))
                hit = hit and wait_until(process, _past(end))
                if not hit:
                    continue  # it was done before: that is no kill
                process.send_signal(signal.SIGKILL)
            finally:
                process.communicate()
            if process.returncode != -signal.SIGKILL:
                continue
            kept = shards(out)
            if len(kept) == SHARDS:
                continue  # no work was outstanding
            found.kills += 1
            found.lost += len(before.items() - kept.items())
            found.redone_shards_max = max(found.redone_shards_max, len(list(out.glob("_attempt-*"))))
            console.print(f"kill {found.kills}: {len(kept)} of {SHARDS} shards", markup=False)
        finish(start(bundle, videos, out))
        compare(whole, out, found)
        shutil.rmtree(out)
    return found


def wait_until(process: subprocess.Popen[str], condition: Callable[[], object]) -> bool:
    """Wait for a condition; False if the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def _past(moment: float) -> Callable[[], bool]:
    return lambda: time.monotonic() >= moment


def kill_actors(bundle: Path, videos: Path, scratch: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Run on Ray, and kill actors meanwhile; also says whether an undisturbed run gives the files of the local one."""
    whole, moments = read_scores(scratch / "whole"), random.Random(seed)
    finish(start(bundle, videos, scratch / "ray", "--engine", "ray"))
    undisturbed = Kills()
    compare(whole, scratch / "ray", undisturbed)
    names = [sorted(shards(scratch / name)) for name in ("whole", "ray")]
    found, series = Kills(), 0
    while found.kills < kills:
        out, series = scratch / f"actors{series}", series + 1
        process = start(bundle, videos, out, "--engine", "ray")
        while found.kills < kills and wait_until(process, partial(_actors, process.pid)):
            pause = time.monotonic() + moments.uniform(0.0, 6.0)
            if not wait_until(process, _past(pause)):
                break
            alive = _actors(process.pid)
            if alive and len(shards(out)) < SHARDS:
                alive[0].kill()
                found.kills += 1
                console.print(
                    f"actor kill {found.kills}: {len(shards(out))} of {SHARDS} shards", markup=False
                )
        finish(process)
        compare(whole, out, found)
        shutil.rmtree(out)
    return {
        "ray_equal": names[0] == names[1] and not undisturbed.lost and not undisturbed.duplicated,
        "ray_kills": found.kills,
        "ray_kill_lost": found.lost + found.duplicated,
    }


def _actors(driver: int) -> Sequence[psutil.Process]:
    """Return the actors that score, of the cluster that a driver started."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def as_json(found: Kills) -> dict[str, int]:
    """Return the figures by name."""
    return asdict(found)
