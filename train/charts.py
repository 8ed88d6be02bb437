"""Pictures of numbers as inline SVG: curves, and bars with their interval. Colours come from the page's style."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from ivdr_deploy._text import as_text
from ivdr_deploy.evaluation.metrics import Accuracy

_WIDTH, _HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 20
_MAX_POINTS = 600
"""Of a longer curve each drawn point is the mean of neighbours."""

Points = Sequence[tuple[float, float]]


def escaped(text: str) -> str:
    """Return any text as HTML."""
    return html.escape(as_text(text), quote=True)


def figure(value: float) -> str:
    """Show a number in few digits."""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def curve(name: str, points: Points, *, marks: Points = ()) -> str:
    """Draw a metric over the steps.

    Args:
        name: Of the metric.
        points: (step, value), growing steps; values that are not finite leave a gap.
        marks: Single values that are drawn as dots, for example of validations.
    """
    finite = [value for _, value in [*points, *marks] if math.isfinite(value)]
    lost = sum(not math.isfinite(value) for _, value in points)
    latest = (points or marks)[-1][1]
    said = f"<b>{escaped(name)}</b> {figure(latest)}" + (f", {lost} not finite" if lost else "")
    if not finite:
        return f'<figure class="curve"><figcaption>{said}</figcaption></figure>'
    first, last = min(x for x, _ in [*points, *marks]), max(x for x, _ in [*points, *marks])
    low, high = _range(min(finite), max(finite))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for value in (low, (low + high) / 2, high):
        _, y = at(first, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{figure(value)}</text>')
    for x, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        place = at(x, low)[0]
        parts.append(f'<text x="{place:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{x:g}</text>')
    for stretch in _stretches(_thinned(points)):
        places = [at(x, y) for x, y in stretch]
        if len(places) == 1:
            parts.append(f'<circle class="line" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="1.5"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}"/>')
    for x, y in marks:
        if math.isfinite(y):
            place, height = at(x, y)
            title = f"<title>step {x:g}: {figure(y)}</title>"
            parts.append(f'<circle class="mark" cx="{place:.1f}" cy="{height:.1f}" r="3">{title}</circle>')
    label = f"{name} from step {first:g} to {last:g}, latest {figure(latest)}"
    return (
        f'<figure class="curve"><figcaption>{said}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(label)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def interval_bar(value: float, low: float, high: float) -> str:
    """Draw a share with its interval on the scale from 0 to 1."""
    if math.isnan(value):
        return '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"></svg>'
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="10"/>'
        f'<rect class="value" width="{100 * value:.2f}" height="10"/>'
        f'<rect class="interval" x="{100 * low:.2f}" y="4" width="{100 * max(high - low, 0.004):.2f}" height="2"/>'
        "</svg>"
    )


def class_bars(per_class: dict[str, Accuracy]) -> str:
    """Show the accuracy of every class with its interval, the worst first."""
    asked = sorted((one for one in per_class.items() if one[1].total), key=lambda one: (one[1].value, one[0]))
    lines = []
    for label, accuracy in asked:
        low, high = accuracy.interval
        said = f"{accuracy.value:.0%} ({accuracy.correct}/{accuracy.total}; {low:.0%} to {high:.0%})"
        bar = interval_bar(accuracy.value, low, high)
        lines.append(f"<li><span>{escaped(label)}</span>{bar}<span>{said}</span></li>")
    unasked = [label for label, accuracy in per_class.items() if not accuracy.total]
    note = f"<p>Without a video here: {escaped(', '.join(unasked))}.</p>" if unasked else ""
    return f'<ul class="bars">{"".join(lines)}</ul>{note}'


def _range(low: float, high: float) -> tuple[float, float]:
    """Widen a range a little, so that lines do not lie on its ends."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        half = 0.5 * max(abs(low), abs(high)) or 1.0
        return low - half, high + half
    edge = 0.04 * (high - low)
    return (low if low >= 0 and low - edge < 0 else low - edge), high + edge


def _thinned(points: Points) -> Points:
    """Take the mean of neighbours where there are more points than a picture shows; of those that are finite."""
    if len(points) <= _MAX_POINTS:
        return points
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], _mean_of_finite([y for _, y in group])) for group in groups]


def _mean_of_finite(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _stretches(points: Points) -> list[list[tuple[float, float]]]:
    """Cut a curve where a value is not finite."""
    out: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            out[-1].append((x, y))
        elif out[-1]:
            out.append([])
    return [one for one in out if one]
