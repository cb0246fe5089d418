"""Plots as SVG: lines with error bars, and grids of shaded cells.

Colours are classes, which the page's style sheet sets for light, dark and paper. Series differ by
marker and dash too, so that they can be told apart without colour. What a mark stands for is its
title, shown when pointed at. Knows numbers and labels; knows nothing of evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pruning.report.markup import Markup, element, joined

SERIES = 6
"""How many series have a look of their own."""

_WIDTH, _HEIGHT = 340, 225
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 8, 40
_MARK = 4.0
_FEW, _MANY = (1, 2, 5), (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 3, 4, 5, 7)
"""First digits of logarithmic ticks, over a wide and a narrow range."""
_WIDE = 4.0


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value."""

    x: float
    y: float
    title: str
    """What is shown when it is pointed at."""
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind, in order."""

    name: str
    look: int
    """Which colour, marker and dash, from 0 on."""
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """What the axes mean and where they begin and end."""

    x: str
    y: str
    logarithmic: bool = False
    """Of y."""
    y_range: tuple[float, float] | None = None
    """None: what the points need, and 0 unless logarithmic."""
    x_from_zero: bool = True


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values to places."""

    low: float
    high: float
    start: float
    end: float
    form: Callable[[float], float] = field(default=float)

    def __call__(self, value: float) -> float:
        low, high = self.form(self.low), self.form(self.high)
        share = (self.form(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def line_plot(series: Sequence[Series], axes: Axes) -> Markup:
    """Return a plot of series that share their axes."""
    points = [point for each in series for point in each.points]
    x = _x_scale(points, axes)
    y = _y_scale(points, axes)
    ticks = _log_ticks(y.low, y.high) if axes.logarithmic else _ticks(y.low, y.high)
    return element(
        "svg",
        *(_gridline(y(tick), _number(tick)) for tick in ticks),
        *(_x_tick(x(tick), _number(tick)) for tick in _ticks(x.low, x.high)),
        _axis_labels(axes),
        *(_drawn(each, x, y) for each in series),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{axes.y} against {axes.x}",
        class_="plot",
    )


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """Return a list of series' names with their marks."""
    return element(
        "ul",
        *(
            element(
                "li",
                element(
                    "svg",
                    element("line", x1=0, y1=7, x2=28, y2=7, class_=f"line s{look % SERIES}"),
                    _mark(14, 7, look),
                    viewBox="0 0 28 14",
                    width=28,
                    height=14,
                    aria_hidden="true",
                ),
                name,
            )
            for name, look in names
        ),
        class_="legend",
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """A shaded cell; without a shade, an empty one."""

    text: str
    title: str
    shade: float | None
    """0 to 1."""


def grid(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    label: str,
    *,
    margin: float,
    side: float = 26.0,
) -> Markup:
    """Return rows of cells under column headings.

    Args:
        label: says what the columns are.
        margin: the width of the rows' names.
        side: the width of a cell.
    """
    height = 26.0
    width = margin + side * len(columns) + 4
    below = 20 + height * len(rows)
    return element(
        "svg",
        *(
            element("text", name, x=margin + side * (i + 0.5), y=14, class_="tick middle")
            for i, name in enumerate(columns)
        ),
        *(
            _cell(cell, margin + side * column, 20 + height * row, side, height)
            for row, (_, cells) in enumerate(rows)
            for column, cell in enumerate(cells)
        ),
        *(
            element("text", name, x=margin - 8, y=20 + height * (row + 0.65), class_="tick end")
            for row, (name, _) in enumerate(rows)
        ),
        element("text", label, x=margin + side * len(columns) / 2, y=below + 16, class_="label"),
        viewBox=f"0 0 {width:g} {below + 22:g}",
        role="img",
        aria_label=label,
        class_="grid",
        style=f"max-width:{width * 1.15:g}px",
    )


def _cell(cell: Cell, x: float, y: float, width: float, height: float) -> Markup:
    strong = cell.shade is not None and cell.shade > 0.55
    return element(
        "g",
        element("title", cell.title),
        element(
            "rect",
            x=x + 1,
            y=y + 1,
            width=width - 2,
            height=height - 2,
            rx=3,
            class_="empty" if cell.shade is None else "heat",
            fill_opacity=None if cell.shade is None else 0.06 + 0.94 * cell.shade,
        ),
        element(
            "text",
            cell.text,
            x=x + width / 2,
            y=y + height * 0.65,
            class_=f"cell {'strong' if strong else ''}",
        ),
    )


def _x_scale(points: Sequence[Point], axes: Axes) -> _Scale:
    low = 0.0 if axes.x_from_zero else min(point.x for point in points)
    high = max(point.x for point in points)
    pad = 0.04 * (high - low or 1.0)
    start = low if axes.x_from_zero else low - pad
    return _Scale(start, high + pad, _LEFT, _WIDTH - _RIGHT)


def _y_scale(points: Sequence[Point], axes: Axes) -> _Scale:
    if axes.y_range is not None:
        low, high = axes.y_range
    else:
        lows = [point.y - (0 if axes.logarithmic else point.error) for point in points]
        low = min(lows) if axes.logarithmic else min(0.0, *lows)
        high = max(point.y + point.error for point in points)
    if axes.logarithmic:
        high = max(high, low * 1.2)
        return _Scale(low / 1.03, high * 1.05, _HEIGHT - _BOTTOM, _TOP, math.log)
    high = high if high > low else low + 1.0
    return _Scale(low, low + (high - low) * 1.05, _HEIGHT - _BOTTOM, _TOP)


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * d for d in (1, 2, 2.5, 5, 10) if power * d >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return at most six of the usual numbers between two."""
    digits = _FEW if high / low > _WIDE else _MANY
    found = [d * 10.0**p for p in range(-3, 6) for d in digits if low <= d * 10.0**p <= high]
    every = math.ceil(len(found) / 6) or 1
    return found[::every]


def _number(value: float) -> str:
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def _gridline(y: float, text: str) -> Markup:
    return joined(
        element("line", x1=_LEFT, y1=y, x2=_WIDTH - _RIGHT, y2=y, class_="rule"),
        element("text", text, x=_LEFT - 7, y=y + 3.5, class_="tick end"),
    )


def _x_tick(x: float, text: str) -> Markup:
    base = _HEIGHT - _BOTTOM
    return joined(
        element("line", x1=x, y1=base, x2=x, y2=base + 4, class_="axis"),
        element("text", text, x=x, y=base + 16, class_="tick middle"),
    )


def _axis_labels(axes: Axes) -> Markup:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return joined(
        element(
            "line",
            x1=_LEFT,
            y1=_HEIGHT - _BOTTOM,
            x2=_WIDTH - _RIGHT,
            y2=_HEIGHT - _BOTTOM,
            class_="axis",
        ),
        element("text", axes.x, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 8, class_="label"),
        element(
            "text",
            axes.y,
            x=0,
            y=0,
            class_="label",
            transform=f"translate(13 {middle:g}) rotate(-90)",
        ),
    )


def _drawn(series: Series, x: _Scale, y: _Scale) -> Markup:
    places = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in series.points)
    return joined(
        element("polyline", points=places, class_=f"line s{series.look % SERIES}"),
        *(_pointed(point, series, x, y) for point in series.points),
    )


def _pointed(point: Point, series: Series, x: _Scale, y: _Scale) -> Markup:
    at, top, bottom = x(point.x), y(point.y + point.error), y(point.y - point.error)
    bar = f"M{at:.1f} {top:.1f}V{bottom:.1f}M{at - 3:.1f} {top:.1f}h6M{at - 3:.1f} {bottom:.1f}h6"
    return element(
        "g",
        element("title", f"{series.name}: {point.title}"),
        element("path", d=bar, class_=f"bar s{series.look % SERIES}") if point.error else None,
        _mark(at, y(point.y), series.look),
        element("circle", cx=at, cy=y(point.y), r=9, class_="target"),
    )


def _mark(x: float, y: float, look: int) -> Markup:
    """Return a series' own marker."""
    m = _MARK
    circle = f"M{x - m:.1f} {y:.1f}a{m} {m} 0 1 0 {2 * m} 0a{m} {m} 0 1 0 {-2 * m} 0Z"
    square = f"M{x - m:.1f} {y - m:.1f}h{2 * m}v{2 * m}h{-2 * m}Z"
    up = f"M{x:.1f} {y - m * 1.3:.1f}l{m * 1.3} {m * 2.2}h{-m * 2.6}Z"
    diamond = f"M{x:.1f} {y - m:.1f}l{m} {m}l{-m} {m}l{-m} {-m}Z"
    down = f"M{x:.1f} {y + m * 1.3:.1f}l{m * 1.3} {-m * 2.2}h{-m * 2.6}Z"
    flat = f"M{x - m:.1f} {y - m / 2:.1f}h{2 * m}v{m}h{-2 * m}Z"
    shapes = (circle, square, up, diamond, down, flat)
    return element("path", d=shapes[look % SERIES], class_=f"mark s{look % SERIES}")
