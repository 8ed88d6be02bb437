"""``make bench-serving``: both servers under load, damaged input, killed workers and signals, and for a long time.

They are started by ``ivdr serve``. The report is written after each part, and one of an earlier run is carried on: what
was not measured again stays, with the machine and the time that it was measured on. A figure that a server has not is
absent, with the reason.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.choices import chosen
from examples.serving import faults, parts
from examples.serving.faults import NotMeasuredError
from examples.serving.material import make_bundle
from examples.serving.parts import Bench
from examples.serving.servers import SERVERS, ServerName
from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import scratch_folder
from ivdr_deploy.benchmarks.report import write_report
from ivdr_deploy.environment import environment_facts
from ivdr_deploy.errors import IvdrError

PARTS: dict[str, Callable[[ServerName, Bench], dict[str, Any]]] = {
    "latency": parts.latency,
    "batching": parts.batching,
    "overlap": parts.overlap,
    "mutants": faults.mutated,
    "kill": faults.killed_worker,
    "drain": faults.drained,
    "update": faults.updated,
    "soak": faults.soaked,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.serving.bench_serving", description=__doc__)
    parser.add_argument("--parts", default=" ".join(PARTS), help="names, with blanks between")
    parser.add_argument("--servers", default=" ".join(SERVERS), help="names, with blanks between")
    parser.add_argument("--turns", type=int, default=parts.TURNS, help="of a latency")
    parser.add_argument("--mutants", type=int, default=parts.MUTANTS, help="damaged files that are sent")
    parser.add_argument("--soak", type=int, default=parts.SOAK, help="requests of the soak")
    parser.add_argument("--out", type=Path, default=Path("build/bench/serving.json"), help="the report")
    given = parser.parse_args(arguments)
    with exiting("bench-serving"):
        names = chosen(given.parts, PARTS, what="part")
        servers = chosen(given.servers, SERVERS, what="server")
        with scratch_folder("ivdr-bench-serving-") as scratch:
            bundle = make_bundle(scratch / "bundle")
            bench = Bench(
                bundle=bundle, scratch=scratch, turns=given.turns, mutants=given.mutants, soak=given.soak
            )
            good = [run(part, server, bench, given.out) for part in names for server in servers]
        console.print(f"report: {given.out}", markup=False)
        if not all(good):
            raise SystemExit(1)


def run(part: str, server: ServerName, bench: Bench, out: Path) -> bool:
    """Measure one part of one server and write it into the report; returns whether it could be measured."""
    console.rule(f"[bold]{part}, {server}", align="left")
    facts, begin = environment_facts(), time.monotonic()  # the load is that from before
    figures: dict[str, Any] = {}
    reason, failed = "", False
    try:
        figures = PARTS[part](server, bench)
    except NotMeasuredError as absent:
        reason = str(absent)
    except IvdrError as error:
        reason, failed = str(error), True
    report = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"parts": {}}
    held, key = report.setdefault(server, {}), f"{part} {server}"
    for name in report["parts"].get(key, {}).get("figures", ()):
        held.pop(name, None)  # of an earlier run
    held.update(figures)
    seconds = round(time.monotonic() - begin, 1)
    report["parts"][key] = {
        "figures": list(figures),
        "not_measured": reason,
        "failed": failed,
        "seconds": seconds,
        "environment": facts,
    }
    report["environment"] = facts
    write_report(report, out)
    for name, value in figures.items():
        console.print(f"{name}: {json.dumps(value)}", markup=False)
    if reason:
        console.print(f"not measured: {reason}", style="red" if failed else None, markup=False)
    return not failed


if __name__ == "__main__":
    main()
