"""Markup: HTML and SVG made of elements, in which every text is escaped.

Text that models write is hostile HTML. So there is no way to put a plain string into a page but as
text: only what `element` returned counts as markup.
"""

from __future__ import annotations

from html import escape

_EMPTY = frozenset({"meta", "br", "line", "rect", "path", "circle", "polyline"})


class Markup(str):
    """A string that is markup already."""

    __slots__ = ()


Child = str | Markup | None
"""Markup as it is, a string as text, nothing for None."""


def element(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """Return an element. Attributes: `class_` is `class`, `stroke_width` is `stroke-width`; those
    that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Markup:
    """Return children one after another."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c))


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.6g}"
