"""``make support-matrix``: docs/support-matrix.md, from the records of ``make bench-export`` in docs/results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivdr_deploy._console import console, exiting
from ivdr_deploy._files import atomic_path
from ivdr_deploy._text import one_line
from ivdr_deploy.models.backbones import BACKBONES

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "support-matrix.md"
NOT_MEASURED = "not in this record yet: `make bench-export`"
FIXED_SIZE = "a transformer of a fixed clip size, which `make bench-export` does not take"

_SHORT = 8
"""Characters of a commit, enough for `git show`."""

_HEAD = """# Which backbone runs in which engine

Written by `make support-matrix` from the records `export_*.json` in [results](results); do not edit it. A cell says how
many times as fast as torch eager fp32 the variant is, with the 95 % interval of the median over the turns; the share of
the test videos that get torch's label; the smallest cosine of an output; and whether `ivdr verify` passes it, or the
checks that it fails. A letter is a reason below the table. The figures of a row are of the revision and the day that it
names, and not of the code beside this page: what was changed since may give others.
"""


def main() -> None:
    """Write the page."""
    with exiting("support-matrix"):
        with atomic_path(PAGE) as temporary:
            temporary.write_text(render(read_records(RECORDS)), encoding="utf-8")
        console.print(f"wrote {PAGE}", markup=False)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every record, by the name of its file."""
    return {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("export_*.json"))
    }


def render(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the page as Markdown: one section for each record."""
    return "\n".join([_HEAD, *(_section(name, record) for name, record in records.items())])


def _section(name: str, record: Mapping[str, Any]) -> str:
    measured: Mapping[str, Any] = record["backbones"]
    columns = _columns(measured)
    headings = " | ".join(f"`{column}`" for column in columns)
    reasons: dict[str, str] = {}
    lines = [
        f"## {_machine(next(iter(measured.values())))}",
        "",
        f"[{name}](results/{name}). {record['how']}",
        "",
        f"| backbone | revision | weights | clip | torch eager, ms | load | export, s | {headings} |",
        "|---" * (7 + len(columns)) + "|",
    ]
    for backbone in BACKBONES:
        found = measured.get(backbone)
        if found is None or "error" in found:
            why = FIXED_SIZE if BACKBONES[backbone].fixed_size else NOT_MEASURED
            letter = _letter(reasons, why if found is None else found["error"])
            lines.append(f"| `{backbone}` | | | | | | | " + " | ".join([letter] * len(columns)) + " |")
            continue
        cells = [_cell(found, column, reasons) for column in columns]
        facts = found["environment"]
        lines.append(
            f"| `{backbone}` | {_revision(facts)} | {found.get('network', 'random')} | {found['clip']} "
            f"| {found['eager_ms']:.1f} | {facts['load_average']} | {found['export_seconds']:.0f} | "
            + " | ".join(cells)
            + " |"
        )
    lines += ["", *(f"- {letter}: {_safe(why)}" for why, letter in reasons.items()), ""]
    return "\n".join(lines)


def _columns(measured: Mapping[str, Any]) -> list[str]:
    """Name every variant that some backbone has, and every pair of engine and precision that none has."""
    ids: list[str] = []
    pairs: list[str] = []
    for found in measured.values():
        ids += [name for name in found.get("variants", ()) if name not in (*ids, "torch-fp32")]
        pairs += [pair for pair in found.get("not_built", ()) if pair not in pairs]
    built = {_pair(name) for name in ids}
    return [*ids, *(pair for pair in pairs if pair not in built)]


def _pair(variant: str) -> str:
    """Return engine and precision of an id such as ``aoti-fp32-cpu-avx2``."""
    return " ".join(variant.split("-")[:2])


def _cell(found: Mapping[str, Any], column: str, reasons: dict[str, str]) -> str:
    variant = found["variants"].get(column)
    if variant is None:
        pair = column if " " in column else _pair(column)
        return _letter(reasons, found["not_built"].get(pair) or _why_absent(found, pair))
    if variant["over_eager"] is None:
        return _letter(reasons, f"{column} was built, and cannot run on this machine")
    speed = f"{variant['over_eager']:.2f} [{variant['over_eager_low']:.2f}, {variant['over_eager_high']:.2f}]"
    agreement, cosine = variant["top1_agreement"], variant["min_cosine"]
    parity = "" if agreement is None or cosine is None else f", {agreement:.1%}, {cosine:.4f}"
    verdict = "PASS" if variant["verified"] else f"FAIL ({', '.join(variant['failed'])})"
    if not parity and variant["verified"]:  # by golden clips alone: no video went through it
        verdict = "not verified over videos"
    return f"{speed}{parity}, {verdict}"


def _why_absent(found: Mapping[str, Any], pair: str) -> str:
    """Say why a variant is missing of which nobody said that it was not built."""
    if any(_pair(variant) == pair for variant in found["variants"]):
        return "not for the processor that measured this one"
    return "not tried: there was no such variant at the revision that measured this one"


def _machine(found: Mapping[str, Any]) -> str:
    facts = found["environment"]
    sets = ", ".join(facts["instruction_sets"]) or "none of note"
    packages = facts["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "onnxruntime") if name in packages)
    gpus = "".join(f", {gpu['name']}" for gpu in facts["gpus"])
    return _safe(f"{facts['cpu']} ({sets}), {facts['cores']} cores{gpus}; {versions}")


def _revision(facts: Mapping[str, Any]) -> str:
    """Say which code gave the figures, and when."""
    commit, _, changed = facts["git_revision"].partition("-")
    name = f"`{commit[:_SHORT]}`{' with changes' if changed else ''}" if commit else "of no checkout"
    return _safe(f"{name}, {facts['time'][:10]}")


def _letter(reasons: dict[str, str], why: str) -> str:
    return reasons.setdefault(why, _LETTERS[len(reasons)])


_LETTERS: Sequence[str] = [
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"a{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
]


def _safe(text: str) -> str:
    """Keep a text from breaking the table."""
    return one_line(text).replace("|", "/")


if __name__ == "__main__":
    main()
