"""What can be wrong with the files that lists of videos name, once each has been decoded."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from ivdr_deploy.datasets.lists import one_spelling
from ivdr_deploy.errors import VideoError
from ivdr_deploy.spec import ClipSpec
from train.facts import VideoFacts
from train.faults import ERRORS, Finding, Listed, finding

_RATES = 1.5
"""How far apart frame rates may be."""


def faults_of_files(lists: Sequence[Listed], seen: Mapping[str, VideoFacts | VideoError]) -> list[Finding]:
    """Find what the files show.

    Args:
        lists: The lists.
        seen: What each file showed, by the key of its entries.
    """
    uris = {entry.key: entry.uri for one in lists for entry in one.entries}
    bad: dict[str, list[str]] = defaultdict(list)
    good: dict[str, VideoFacts] = {}
    for key, one in seen.items():
        if isinstance(one, VideoFacts):
            good[key] = one
        elif not os.path.lexists(key):
            bad["missing"].append(uris[key])
        else:
            bad[one.code if one.code in ERRORS else "unreadable"].append(f"{uris[key]} ({one.message})")
    words = {"missing": "videos do not exist", "no_video_stream": "files hold no pictures"}
    found = [
        Finding(kind, f"{len(names)} {words.get(kind, 'videos cannot be used')}", tuple(names))
        for kind, names in sorted(bad.items())
    ]
    return found + _copies(lists, good, uris) + _odd_videos(good, uris)


def _copies(
    lists: Sequence[Listed], good: Mapping[str, VideoFacts], uris: Mapping[str, str]
) -> list[Finding]:
    labels = {entry.key: one_spelling(entry.label or "") for one in lists for entry in one.entries}
    inside = [{entry.key for entry in one.entries} for one in lists]
    by_content: dict[str, list[str]] = defaultdict(list)
    for key, facts in good.items():
        by_content[facts.content].append(key)
    several = [keys for keys in by_content.values() if len(keys) > 1]

    def named(wanted: Callable[[list[str]], bool]) -> Iterable[str]:
        return (" = ".join(uris[key] for key in keys) for keys in several if wanted(keys))

    def across(keys: list[str]) -> bool:
        return len(inside) == 2 and bool(inside[0].intersection(keys)) and bool(inside[1].intersection(keys))

    return [
        *finding(
            "copies_of_two_classes",
            "videos show the same and have different labels",
            named(lambda keys: len({labels[key] for key in keys}) > 1),
        ),
        *finding("same_video_in_both", "videos of the two lists show the same", named(across)),
        *finding("copies", "videos show the same", named(lambda keys: not across(keys))),
    ]


def _odd_videos(good: Mapping[str, VideoFacts], uris: Mapping[str, str]) -> list[Finding]:
    frames = ClipSpec().num_frames

    def named(wanted: Callable[[VideoFacts], bool], said: Callable[[VideoFacts], str]) -> Iterable[str]:
        return (f"{uris[key]}{said(facts)}" for key, facts in good.items() if wanted(facts))

    found = [
        *finding(
            "too_short",
            f"videos have fewer than {frames} frames",
            named(lambda one: one.num_frames < frames, lambda one: f" ({one.num_frames})"),
        ),
        *finding("still", "videos do not move", named(lambda one: one.still, lambda one: "")),
        *finding(
            "variable_frame_rate",
            "videos have a variable frame rate",
            named(lambda one: one.variable_frame_rate, lambda one: f" ({one.fps:.3g} on average)"),
        ),
    ]
    rates = {key: facts.fps for key, facts in good.items() if facts.fps > 0}
    if rates and max(rates.values()) > _RATES * min(rates.values()):
        ends = [min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)]
        said = " to ".join(f"{rates[key]:.4g} ({uris[key]})" for key in ends)
        found.append(Finding("frame_rates_differ", f"frame rates go from {said}"))
    return found
