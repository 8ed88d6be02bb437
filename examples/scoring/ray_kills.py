"""Kills what a scoring run on Ray consists of: actors, the driver, and a node of a cluster of two."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from examples.scoring.kills import (
    SHARDS,
    Kills,
    command,
    compare,
    finish,
    kill_command,
    past,
    shards,
    start,
    wait_until,
)
from ivdr_deploy._console import console
from ivdr_deploy.scoring import read_scores

_RAY = ("--engine", "ray")
_HERE = "127.0.0.1"


def kill_ray(
    bundle: Path,
    videos: Path,
    scratch: Path,
    *,
    actors: int,
    drivers: int,
    nodes: int,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Run on Ray, undisturbed and with kills of each kind; see ``kills.kill_command`` for the arguments."""
    finish(start(bundle, videos, scratch / "ray", more=_RAY))
    undisturbed = Kills()
    compare(read_scores(scratch / "whole"), scratch / "ray", undisturbed)
    names = [sorted(shards(scratch / name)) for name in ("whole", "ray")]
    found = {
        "actor": _kill_actors(bundle, videos, scratch, kills=actors, seed=seed),
        "driver": kill_command(bundle, videos, scratch, kills=drivers, seconds=seconds, seed=seed, more=_RAY),
        "node": _kill_nodes(bundle, videos, scratch, kills=nodes, seed=seed),
    }
    return {
        "ray_equal": names[0] == names[1] and not undisturbed.lost and not undisturbed.duplicated,
        "ray_kills": {name: one.kills for name, one in found.items()},
        "ray_kill_lost": sum(one.lost + one.duplicated for one in found.values()),
    }


def _kill_actors(bundle: Path, videos: Path, scratch: Path, *, kills: int, seed: int) -> Kills:
    whole, moments = read_scores(scratch / "whole"), random.Random(seed)
    found, series = Kills(), 0
    while found.kills < kills:
        out, series = scratch / f"actors{series}", series + 1
        process = start(bundle, videos, out, more=_RAY)
        while found.kills < kills and wait_until(process, partial(actors_below, process.pid)):
            if not wait_until(process, past(time.monotonic() + moments.uniform(0.0, 6.0))):
                break
            alive = actors_below(process.pid)
            if alive and len(shards(out)) < SHARDS:
                alive[0].kill()
                found.kills += 1
                console.print(
                    f"actor kill {found.kills}: {len(shards(out))} of {SHARDS} shards", markup=False
                )
        finish(process)
        compare(whole, out, found)
        shutil.rmtree(out)
    return found


def actors_below(parent: int) -> Sequence[psutil.Process]:
    """Return the actors that score, below the process that started their node."""
    below = psutil.Process(parent).children(recursive=True)
    return [one for one in below if "".join(command(one)[:1]).startswith("ray::MapWorker")]


def _kill_nodes(bundle: Path, videos: Path, scratch: Path, *, kills: int, seed: int) -> Kills:
    """Kill the second of two nodes while an actor on it works, one run for each kill."""
    whole, moments = read_scores(scratch / "whole"), random.Random(seed)
    found = Kills()
    while found.kills < kills:
        with _node("--head", f"--port={_free_port()}", "--include-dashboard=false") as (_, address):
            with _node(f"--address={address}") as (second, _):
                out = scratch / f"nodes{found.kills}"
                process = start(bundle, videos, out, more=_RAY, RAY_ADDRESS=address)
                begun = wait_until(process, partial(actors_below, second.pid))
                begun = begun and wait_until(process, past(time.monotonic() + moments.uniform(0.0, 6.0)))
                if begun and len(shards(out)) < SHARDS:
                    _kill_all(second)
                    found.kills += 1
                    console.print(
                        f"node kill {found.kills}: {len(shards(out))} of {SHARDS} shards", markup=False
                    )
            finish(process)
        compare(whole, out, found)
        shutil.rmtree(out)
    return found


@contextmanager
def _node(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a node that only this machine can reach; yields it, and the address in ``words`` or of its own port."""
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={_HERE}", "--num-cpus=2", *words]
    node = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    try:
        assert node.stdout is not None
        for line in node.stdout:
            if "Ray runtime started" in line:
                break
        else:
            raise RuntimeError(f"the node ended with {node.wait()}")
        port = next(
            (word.partition("=")[2] for word in words if word.startswith(("--port", "--address"))), ""
        )
        yield node, port if ":" in port else f"{_HERE}:{port}"
    finally:
        _kill_all(node)
        node.communicate()


def _kill_all(node: subprocess.Popen[str]) -> None:
    """Kill a node as the loss of its machine does: all its processes, and none of them can say anything."""
    if node.poll() is not None:
        return
    family = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
    for process in family:
        process.send_signal(signal.SIGSTOP)  # nobody starts another meanwhile
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HERE, 0))
        return int(probe.getsockname()[1])
