"""The plot of `benchmarks.growth`: panels side by side, both axes logarithmic, as one SVG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 300, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 34, 44
_COLOURS = ("#1f6f8b", "#c8553d")
_STYLE = (
    "text{font:11px sans-serif;fill:#444}.title{font-weight:bold}.grid{stroke:#ddd}"
    "path{fill:none;stroke-width:2}"
)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one kind; all values are above 0."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over one thing that grows."""

    title: str
    x: str
    curves: tuple[Curve, ...]


def growth_plot(panels: Sequence[Panel], y: str) -> str:
    """Return an SVG document; all panels share the range of y."""
    values = [value for panel in panels for curve in panel.curves for _, value in curve.points]
    low, high = _decades(values)
    drawn = "".join(
        f'<g transform="translate({index * _WIDTH},0)">{_panel(panel, low, high, y)}</g>'
        for index, panel in enumerate(panels)
    )
    size = f"0 0 {_WIDTH * len(panels)} {_HEIGHT}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{drawn}</svg>\n'
    )


def _panel(panel: Panel, low: int, high: int, y: str) -> str:
    start, end = _decades([at for curve in panel.curves for at, _ in curve.points])

    def across(value: float) -> float:
        return _place(value, start, end, _LEFT, _WIDTH - _RIGHT)

    def up(value: float) -> float:
        return _place(value, low, high, _HEIGHT - _BOTTOM, _TOP)

    parts = [_text(_WIDTH / 2, 16, panel.title, "middle", "title")]
    parts.append(_text(_WIDTH / 2, _HEIGHT - 8, panel.x, "middle"))
    parts.append(_text(4, _TOP - 6, y, "start"))
    for power in range(low, high + 1):
        height = up(10.0**power)
        parts.append(_line(_LEFT, height, _WIDTH - _RIGHT, height))
        parts.append(_text(_LEFT - 5, height + 4, f"{10.0**power:g}", "end"))
    for power in range(start, end + 1):
        parts.append(_text(across(10.0**power), _HEIGHT - _BOTTOM + 16, f"{10**power:,}", "middle"))
    for index, curve in enumerate(panel.curves):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [(across(at), up(value)) for at, value in curve.points]
        path = "M" + "L".join(f"{x:.1f},{height:.1f}" for x, height in places)
        parts.append(f'<path d="{path}" stroke="{colour}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{h:.1f}" r="3" fill="{colour}"/>' for x, h in places]
        parts.append(_text(places[-1][0], places[-1][1] - 7, curve.name, "end"))
    return "".join(parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the powers of ten around values."""
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _place(value: float, low: int, high: int, start: float, end: float) -> float:
    return start + (math.log10(value) - low) / (high - low) * (end - start)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="grid"/>'
