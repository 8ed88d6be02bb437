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
_ADDRESSES = ("127.0.0.2", "127.0.0.3")
"""Of the two nodes. In place of 127.0.0.1 Ray would take an address of the network; it listens on all of them."""

OPEN = {"RAY_AUTH_MODE": "disabled"}
"""Otherwise Ray asks for a token that it writes to the home folder."""


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
        address = f"{_ADDRESSES[0]}:{free_port()}"
        head = ("--head", f"--port={address.partition(':')[2]}", "--include-dashboard=false")
        with node(_ADDRESSES[0], *head):
            with node(_ADDRESSES[1], f"--address={address}") as second:
                out = scratch / f"nodes{found.kills}"
                process = start(bundle, videos, out, more=_RAY, RAY_ADDRESS=address, **OPEN)
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
def node(here: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a node of two cores at an address of its own."""
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={here}", "--num-cpus=2", *words]
    node = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | OPEN
    )
    said = []
    try:
        assert node.stdout is not None
        for line in node.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise RuntimeError(f"the node ended with {node.wait()}: {''.join(said[-10:])}")
        yield node
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


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((_ADDRESSES[0], 0))
        return int(probe.getsockname()[1])
