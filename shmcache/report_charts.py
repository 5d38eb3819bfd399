"""The charts of a report, as inline SVG without a script or a style attribute.

I1  Positions across are percentages and text is outside whatever is stretched, so that letters and strokes keep their size on a
    narrow screen.
I2  Whatever text comes in is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as quote

__all__ = ["bars", "columns", "legend", "lines", "short"]


def short(v: float) -> str:
    """A number in a few letters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if v >= size:
            return f"{v / size:.3g}{unit}"
    return f"{v:.3g}"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A line of (colour, name)."""
    return '<div class="legend">' + "".join(f'<span><i class="{c}"></i>{quote(n)}</span>' for c, n in entries) + "</div>"


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    """x and width in percent."""
    if not width or not height:
        return ""
    return f'<rect x="{x:.2f}%" y="{y:.1f}" width="{width:.2f}%" height="{height:.1f}" fill="var(--{colour})"/>'


def _text(x: str, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}"{named}>{quote(text)}</text>' if text else ""


def bars(rows: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]) -> str:
    """Stacked bars, one below the other: (label, tooltip, ((colour, share), ...)); shares of one bar add up to 1 at most."""
    height = 18 if len(rows) <= 16 else 9 if len(rows) <= 64 else 5
    out = []
    for i, (label, tip, parts) in enumerate(rows):
        x, cells = 0.0, []
        for colour, share in parts:
            cells.append(_rect(100 * x, 0, 100 * share, height, colour))
            x += share
        said = label if len(rows) <= 16 or i % (4 if height > 5 else 8) == 0 else ""
        out.append(
            f'<span class="h{height}">{quote(said)}</span>'
            f'<svg height="{height}" role="img" aria-label="{quote(tip)}"><title>{quote(tip)}</title>{"".join(cells)}</svg>'
        )
    return f'<div class="bars">{"".join(out)}</div>'


def columns(label: str, values: Sequence[tuple[str, float, str]]) -> str:
    """A column chart of (label, value, tooltip)."""
    height, foot, head = 180, 24, 20
    most, step = max([v for _, v, _ in values] or [0]) or 1, 100 / max(len(values), 1)
    crowded, cells = len(values) > 7, []
    for i, (name, value, tip) in enumerate(values):
        h = max(value / most * (height - foot - head), 1.5 if value else 0)
        middle = f"{(i + 0.5) * step:.2f}%"
        kind, width = "alt" if crowded and i % 2 else "", min(step * 0.92, 22)
        cells.append(
            f"<g><title>{quote(tip)}</title>{_rect((i + 0.5) * step - width / 2, height - foot - h, width, h, 'live')}"
            f"{_text(middle, height - foot - 5 - h, short(value) if value else '', kind=kind if value < most else '')}"
            f"{_text(middle, height - 8, name, kind=kind)}</g>"
        )
    rule = f'<line x1="0" x2="100%" y1="{height - foot}" y2="{height - foot}" stroke="var(--line)"/>'
    return f'<svg height="{height}" role="img" aria-label="{quote(label)}">{rule}{"".join(cells)}</svg>'


def lines(label: str, at: Sequence[float], series: Sequence[tuple[str, Sequence[float | None]]], most: float = 0) -> str:
    """Lines over time: `at` in seconds, rising; each series is (colour, values), None where there is no value."""
    top = most or max([1.0, *(v for _, values in series for v in values if v is not None)])
    height, first, span = 110, at[0], max(at[-1] - at[0], 1e-9)
    drawn = []
    for colour, values in series:
        for run in _runs([(1000 * (t - first) / span, v) for t, v in zip(at, values, strict=True)]):
            dots = [(x, 6 + (1 - min(v / top, 1)) * (height - 12)) for x, v in run]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
            drawn.append(
                f'<polygon points="{dots[0][0]:.1f},{height - 6} {path} {dots[-1][0]:.1f},{height - 6}" fill="var(--{colour})" '
                f'opacity=".13"/><polyline points="{path}" fill="none" stroke="var(--{colour})" stroke-width="2" '
                'stroke-linejoin="round" vector-effect="non-scaling-stroke"/>'
            )
    ticks = [(6, top), (height / 2, top / 2), (height - 6, 0)]
    rules = "".join(
        f'<line x1="0" x2="1000" y1="{y}" y2="{y}" stroke="var(--line)" vector-effect="non-scaling-stroke"/>' for y, _ in ticks
    )
    axis = "".join(_text("100%", y + 4, short(v), "end") for y, v in ticks)
    return (
        f'<figure><figcaption>{quote(label)}</figcaption><svg height="{height}" class="axis">{axis}</svg>'
        f'<svg height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none" role="img" aria-label="{quote(label)}">'
        f"{rules}{''.join(drawn)}</svg></figure>"
    )


def _runs(dots: Iterable[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The stretches without a gap."""
    out: list[list[tuple[float, float]]] = [[]]
    for x, v in dots:
        if v is None:
            out.append([])
        else:
            out[-1].append((x, v))
    return [run for run in out if run]
