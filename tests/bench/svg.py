"""Plots as SVG text without a plotting library: bars with whiskers for competitors, lines for growing cost.

Scales are logarithmic, because competitors differ by a factor of a thousand. Every mark has its number as text, so a
plot can be read without its axis. cnprocd is blue, the others are grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

_OURS, _THEIRS = "#1f77b4", "#8c8c8c"
_LINES = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b")
_LEFT, _WIDTH, _ROW = 190, 760, 26
_APART = 45.0  # between two numbers of an axis: listeners reach slightly different rates


def number(value: float) -> str:
    """Format with three significant digits, without exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def bars(title: str, unit: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw one bar for each row of (name, median, minimum, maximum), shortest first."""
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: row[1])
    if not rows:
        return _document(60, title, ["nothing was measured"])
    low = 10 ** math.floor(math.log10(min(row[2] or row[1] for row in rows)))
    high = max(row[3] for row in rows) * 2.2
    height = 70 + _ROW * len(rows)

    def x(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return _LEFT + share * (_WIDTH - _LEFT - 20)

    parts = _grid(x, low, high, 40, height - 26)
    for i, (name, median, least, most) in enumerate(rows):
        y = 48 + i * _ROW
        colour = _OURS if name.startswith("cnprocd") else _THEIRS
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{x(median) - _LEFT:.1f}" height="16" fill="{colour}"/>',
            f'<path d="M{x(least):.1f} {y + 8}H{x(most):.1f}M{x(least):.1f} {y + 4}v8M{x(most):.1f} {y + 4}v8" '
            'stroke="#000" fill="none"/>',
            f'<text x="{x(most) + 6:.1f}" y="{y + 12}">{number(median)}</text>',
        ]
    parts.append(f'<text x="{_WIDTH / 2}" y="{height - 8}" text-anchor="middle">{escape(unit)}</text>')
    return _document(height, title, parts)


def lines(title: str, across: str, unit: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Draw one line for each series of (x, y), both axes logarithmic."""
    points = [point for line in series.values() for point in line if min(point) > 0]
    if not points:
        return _document(60, title, ["nothing was measured"])
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, right, top, bottom = min(xs), max(xs) * 1.01, max(ys) * 1.6, min(ys) / 1.6
    height, base = 360, 300

    def x(value: float) -> float:
        return 70 + (_WIDTH - 240) * math.log(value / left) / math.log(max(right / left, 1.1))

    def y(value: float) -> float:
        return base - (base - 50) * math.log(value / bottom) / math.log(top / bottom)

    parts = [f'<path d="M70 50V{base}H{_WIDTH - 170}" stroke="#555" fill="none"/>']
    shown_at = -_APART
    for at in sorted({*xs}):
        if x(at) - shown_at >= _APART:
            shown_at = x(at)
            parts.append(f'<text x="{x(at):.1f}" y="{base + 18}" text-anchor="middle">{number(at)}</text>')
    for i, (name, line) in enumerate(series.items()):
        colour = _LINES[i % len(_LINES)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line if min(a, b) > 0)
        parts.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        for a, b in line:
            parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>')
            parts.append(f'<text x="{x(a):.1f}" y="{y(b) - 8:.1f}" text-anchor="middle">{number(b)}</text>')
        a, b = line[-1]
        parts.append(f'<text x="{x(a) + 28:.1f}" y="{y(b) + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    parts.append(f'<text x="{_WIDTH / 2 - 50}" y="{height - 18}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text x="10" y="42">{escape(unit)}</text>')
    return _document(height, title, parts)


def _grid(x: Callable[[float], float], low: float, high: float, top: float, bottom: float) -> list[str]:
    parts, at = [], low
    while at <= high:
        parts.append(f'<path d="M{x(at):.1f} {top}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(at):.1f}" y="{top - 2}" text-anchor="middle" fill="#777">{number(at)}</text>')
        at *= 10
    return parts


def _document(height: float, title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="10" y="20" font-size="15" font-weight="bold">{escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )
