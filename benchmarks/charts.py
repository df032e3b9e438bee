# SPDX-License-Identifier: Apache-2.0
"""Three kinds of chart for what was measured: bars from zero, dots on a logarithmic scale, and ratios around one.

Rows go down the page, panels stand side by side, and what belongs together has one colour. Values are written beside their
marks. The colours can be told apart by those who see fewer of them, and in print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Table = Mapping[str, Mapping[str, float]]
"""What was measured: row, series, value."""
Panels = Mapping[str, Table]
"""Tables of the same rows, by what the values are."""

BASE, REFERENCE, OURS, OPTIMISED, GRAPH = "base alone", "reference", "Graftlet", "optimised", "in a CUDA graph"
COLOURS = {BASE: "#ffffff", REFERENCE: "#a3a3a3", OURS: "#56b4e9", OPTIMISED: "#0072b2", GRAPH: "#0072b2"}
"""The series in the order of their marks."""
LESS, MORE = "#0072b2", "#d55e00"
INK, QUIET, FAINT = "#1f2937", "#6b7280", "#e5e7eb"


def bars(panels: Panels) -> Any:
    """Bars from zero, a group a row. Each series is named at its first bar."""
    groups = {row: _series(panels, row) for row in _rows(panels)}
    tops, below = dict[str, float](), 0.0
    for row, series in groups.items():
        tops[row], below = below, below + len(series) + 0.8
    figure, axes = _figure(panels, 0.17 * below)
    for at, table in zip(axes, panels.values(), strict=True):
        named = set[str]()
        for row, series in groups.items():
            for y, name in enumerate(series):
                if (value := table.get(row, {}).get(name)) is not None:
                    edge = INK if name == BASE else COLOURS[name]
                    at.barh(tops[row] + y, value, 0.84, color=COLOURS[name], edgecolor=edge, linewidth=0.8)
                    _label(at, value, tops[row] + y, number(value) if name in named else f"{number(value)}  {name}")
                    named.add(name)
        at.set_xlim(0, 1.28 * max(_values(table)))
        at.set_xticks([])
    _name_rows(axes, {row: tops[row] + (len(series) - 1) / 2 for row, series in groups.items()}, below - 0.8)
    return figure


def dots(panels: Panels) -> Any:
    """Dots on a logarithmic scale, joined in each row; least and most are labelled, and what is far from both."""
    places = {row: float(y) for y, row in enumerate(_rows(panels))}
    figure, axes = _figure(panels, 0.24 * len(places) + 0.2)
    for at, table in zip(axes, panels.values(), strict=True):
        span = _logarithmic(at, _values(table), 0.2)
        for row, found in table.items():
            values, y = sorted(found.values()), places[row]
            at.plot(values, [y] * len(values), color="#cbd5e1", linewidth=1.5, zorder=1)
            for name, value in found.items():
                edge = INK if name == BASE else COLOURS[name]
                at.scatter(value, y, 26, color=COLOURS[name], edgecolor=edge, linewidth=0.8, zorder=2)
            for value in values[1:-1]:
                if min(math.log10(value / values[0]), math.log10(values[-1] / value)) > 0.1 * span:
                    at.annotate(number(value), (value, y), (0, 4), **SMALL, ha="center")
            _label(at, values[-1], y, number(values[-1]))
            if len(values) > 1:
                _label(at, values[0], y, number(values[0]), left=True)
    _name_rows(axes, places, len(places))
    _key(figure, [name for name in COLOURS if any(name in found for t in panels.values() for found in t.values())])
    return figure


def ratios(panels: Panels) -> Any:
    """One value a row beside one, on a logarithmic scale: less to the left, more to the right."""
    places = {row: float(y) for y, row in enumerate(_rows(panels))}
    figure, axes = _figure(panels, 0.18 * len(places), 10)
    for at, table in zip(axes, panels.values(), strict=True):
        _logarithmic(at, [*_values(table), 1], 0.26)
        at.axvline(1, color=INK, linewidth=0.8)
        for row, found in table.items():
            for value in found.values():
                more = value >= 1.005  # as it is written
                colour = MORE if more else LESS
                at.plot([1, value], [places[row]] * 2, color=colour, linewidth=1.2)
                at.scatter(value, places[row], 16, color=colour, zorder=2)
                _label(at, value, places[row], number(value), left=not more)
    _name_rows(axes, places, len(places))
    return figure


def kept(figure: Any, file: Path) -> None:
    """Write a chart, in few colours; the same values give the same file."""
    from PIL import Image

    figure.set_dpi(130)
    figure.canvas.draw()
    image = Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba()))
    image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def number(value: float) -> str:
    """Three digits, and at most two after the point."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(0, digits), 2)}f}"


# what all of them have

SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "color": INK}


def _figure(panels: Panels, height: float, width: float = 9) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + 0.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for at, title in zip(axes, panels, strict=True):
        at.spines[["top", "right", "bottom"]].set_visible(False)
        at.spines["left"].set_color("#9ca3af")
        at.tick_params(axis="y", length=0)
        at.set_title(title, fontsize=9, color=INK, loc="left")
    return figure, axes


def _logarithmic(at: Any, values: Iterable[float], room: float) -> float:
    """A logarithmic scale with room for labels, as a share of what it shows; how many decades it has."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = math.log10(min(values := list(values))), math.log10(max(values))
    span = max(high - low, 0.3)
    at.set_xscale("log")
    at.set_xlim(10 ** (low - room * span), 10 ** (high + room * span))
    at.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1.2 else (1,)))
    at.xaxis.set_minor_locator(NullLocator())
    at.xaxis.set_major_formatter("{x:,g}")
    at.grid(axis="x", color=FAINT, linewidth=0.8)
    at.tick_params(axis="x", length=0, labelsize=7.5, labelcolor=QUIET)
    at.set_axisbelow(True)
    return span


def _rows(panels: Panels) -> list[str]:
    return list(dict.fromkeys(row for table in panels.values() for row in table))


def _values(table: Table) -> list[float]:
    return [value for found in table.values() for value in found.values()]


def _series(panels: Panels, row: str) -> list[str]:
    """The series that a row has in any panel."""
    there = {name for table in panels.values() for name in table.get(row, ())}
    return [name for name in COLOURS if name in there]


def _name_rows(axes: Any, places: Mapping[str, float], end: float) -> None:
    axes[0].set_yticks(list(places.values()), list(places), fontsize=8, color=INK)
    axes[0].set_ylim(end - 0.3, -0.7)


def _key(figure: Any, names: Iterable[str]) -> None:
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5.5, "markeredgewidth": 0.8}
    marks = {
        n: Line2D([], [], color=COLOURS[n], markeredgecolor=INK if n == BASE else COLOURS[n], **dot) for n in names
    }
    style: dict[str, Any] = {"fontsize": 8, "labelcolor": INK, "frameon": False, "handletextpad": 0.1}
    figure.legend(list(marks.values()), list(marks), loc="outside upper right", ncols=len(marks), **style)


def _label(at: Any, x: float, y: float, text: str, left: bool = False) -> None:
    at.annotate(text, (x, y), (-5 if left else 5, -0.5), **SMALL, va="center", ha="right" if left else "left")
