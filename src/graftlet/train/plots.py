# SPDX-License-Identifier: Apache-2.0
"""Charts as PNG data URIs, one for light pages and one for dark. matplotlib without its global state."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Draw = Callable[[Any, dict[str, str]], None]

THEMES = {
    "light": {"ink": "#1c2024", "faint": "#d9d9e0", "first": "#0f766e", "second": "#c2410c"},
    "dark": {"ink": "#edeef0", "faint": "#3a3f42", "first": "#5eead4", "second": "#fdba74"},
}


def picture(draw: Draw, alt: str, size: tuple[float, float] = (7.2, 3.0)) -> str:
    """HTML of a chart that follows the reader's colour scheme. `draw(axes, colours)` draws it once for each."""
    light, dark = (_png(draw, THEMES[name], size) for name in ("light", "dark"))
    other = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{other}<img src="{light}" alt="{alt}"></picture>'


def _png(draw: Draw, colours: dict[str, str], size: tuple[float, float]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(axis="y", color=colours["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(colours["ink"])
    axes.tick_params(colors=colours["ink"], length=0)
    draw(axes, colours)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(colours["ink"])
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=160, transparent=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def loss_curve(
    history: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]] = (), steps: int = 0, unit: str = "token"
) -> str:
    """Training and validation loss by step, from a Trainer's log history and the measurements before and after."""
    training = [(h["step"], h["loss"]) for h in history if "loss" in h]
    seen = {h["step"]: h["eval_loss"] for h in history if "eval_loss" in h}
    ends = [m["validation_loss"] for m in measured[:2]]
    ends = {s: v for s, v in zip((0, steps), ends, strict=False) if v is not None}
    held_out = sorted((ends | seen).items())

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for points, colour, name in ((training, "first", "training"), (held_out, "second", "validation")):
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=colours[colour], linewidth=2, marker="o", markersize=4, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(f"loss a {unit}")
        axes.set_ylim(bottom=0)
        if training or held_out:
            axes.legend(frameon=False, labelcolor=colours["ink"])

    return picture(draw, "Training and validation loss by step")


def overlaid(runs: Mapping[str, Sequence[tuple[float, float]]], label: str, zero: bool = True) -> str:
    """One line a run, by step. zero: the axis begins there."""

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for shade, (name, points) in zip(_shades(len(runs)), runs.items(), strict=True):
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, color=shade, linewidth=2, marker="o", markersize=3 if len(x) < 40 else 0, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if zero:
            axes.set_ylim(bottom=0)
        if len(runs) > 1:
            axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=8)

    return picture(draw, f"{label} by step", (7.2, 2.6))


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.15 + 0.7 * i / max(count - 1, 1)) for i in range(count)]


def heat(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], label: str) -> str:
    """A field a row and column, coloured by its value; None stays empty."""
    import numpy as np

    held = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.grid(visible=False)
        image = axes.pcolormesh(held, cmap="viridis", vmin=0, edgecolors="none")
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows, fontsize=8)
        step = max(1, len(columns) // 16)
        axes.set_xticks([i + 0.5 for i in range(0, len(columns), step)], columns[::step], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("layer")
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, shrink=0.9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=colours["ink"], labelsize=8, length=0)
        bar.set_label(label, color=colours["ink"])

    return picture(draw, f"{label} by kind and depth of layer", (7.2, 0.34 * len(rows) + 1.1))


def lines(series: dict[str, dict[int, float]], across: str, label: str) -> str:
    """One line a name, over whole numbers."""

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for shade, (name, points) in zip(_shades(len(series)), series.items(), strict=True):
            axes.plot(
                list(points), list(points.values()), color=shade, linewidth=2, marker="o", markersize=3, label=name
            )
        axes.set_xlabel(across)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=8)

    return picture(draw, f"{label} by {across}")


def bars(names: Sequence[str], values: Sequence[float], label: str) -> str:
    """One horizontal bar a name, the first at the top."""

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.barh(range(len(names)), values, color=colours["first"], height=0.7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=colours["faint"], linewidth=0.8)

    return picture(draw, label, (7.2, max(1.6, 0.17 * len(names) + 0.8)))
