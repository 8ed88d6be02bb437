"""The dataset doctor: what is wrong with lists of videos, before hours of training show it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivdr_deploy._console import progress
from ivdr_deploy._text import as_text
from ivdr_deploy.datasets.entries import some
from ivdr_deploy.decoding import DecodeOptions, DecodePool
from ivdr_deploy.errors import VideoError
from ivdr_deploy.video import PathSource, VideoLimits
from train.facts import VideoFacts, look_at
from train.faults import ERRORS, Finding, faults_of_lists, read_listed
from train.file_faults import faults_of_files


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """What was found."""

    lists: tuple[str, ...]
    videos: int
    """Different files that the lists name."""

    findings: tuple[Finding, ...]
    """Errors first, then warnings; each kind once for each list it is in."""

    @property
    def passed(self) -> bool:
        """Whether there is no error; a warning is for a person to judge."""
        return not any(finding.kind in ERRORS for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold, with all examples."""
        return {
            "lists": list(self.lists),
            "videos": self.videos,
            "passed": self.passed,
            "findings": [
                {
                    "kind": finding.kind,
                    "severity": finding.severity,
                    "what": finding.what,
                    "count": len(finding.examples),
                    "examples": list(finding.examples),
                    "hint": finding.hint,
                }
                for finding in self.findings
            ],
        }

    def lines(self) -> list[str]:
        """Return the findings for people: a line each, and one with what to do."""
        out = []
        for finding in self.findings:
            shown = f": {some(finding.examples)}" if finding.examples else ""
            out.append(f"{finding.severity}: {finding.what} ({finding.kind}){shown}")
            out.append(f"    {finding.hint}")
        return out


def check_lists(
    train: str | Path,
    test: str | Path | None = None,
    *,
    root: str | Path | None = None,
    limits: VideoLimits | None = None,
    decode: DecodeOptions | None = None,
) -> CheckReport:
    """Look for what is wrong with a training list and a test list, and decode every video of both from end to end.

    Args:
        train: The list to train on. Of one that holds a test part too, both are checked unless ``test`` is given.
        test: The list to measure on.
        root: Where relative paths in the lists start; None: at the folder of each.
        limits: What a video may cost.
        decode: The decode workers.

    Raises:
        DataError: if nothing can be read of a list.
        ConfigError: if ``root`` is given for a folder.
    """
    lists = read_listed(
        Path(train), None if test is None else Path(test), None if root is None else Path(root)
    )
    found = faults_of_lists(lists)
    paths = {entry.key: entry.path for one in lists for entry in one.entries}
    seen = _look(paths, limits or VideoLimits(), decode)
    found += faults_of_files(lists, seen)
    found.sort(key=lambda finding: finding.kind not in ERRORS)
    return CheckReport(
        lists=tuple(as_text(one.source) for one in lists), videos=len(paths), findings=tuple(found)
    )


def _look(
    paths: dict[str, Path], limits: VideoLimits, decode: DecodeOptions | None
) -> dict[str, VideoFacts | VideoError]:
    """Decode each file once."""
    with DecodePool(decode) as pool:
        seen = pool.each(look_at, ((PathSource(path),) for path in paths.values()), limits=limits)
        return dict(zip(paths, progress(seen, total=len(paths), description="checking"), strict=True))
