# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: the price and, on public data only, the loss over steps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpopt.reports.report import Report

_INK, _GREY, _BLUE, _ORANGE = "#1c2430", "#8a94a6", "#2f6fde", "#d9622b"


def curves(report: Report) -> bytes:
    """Epsilon over steps on the left, validation loss over steps on the right (if public), as a PNG."""
    losses = [(step, loss) for step, _, loss in report.curve if loss is not None]
    panels = 2 if losses else 1
    figure = Figure(figsize=(4.8 * panels, 3.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _price_panel(axes[0], report)
    if losses:
        _loss_panel(axes[1], losses)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def prices(lines: Mapping[str, Sequence[tuple[int, float]]], *, delta: float, unit: str) -> bytes:
    """Epsilon over the number of releases, one line for each accountant, as a PNG."""
    figure = Figure(figsize=(6.4, 4.0), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _dress(axes, f"epsilon, at most (delta {delta:g})")
    axes.set_xlabel(unit)
    finite = False
    for (name, points), color in zip(lines.items(), (_BLUE, _ORANGE, _INK, _GREY), strict=False):
        known = [(count, price) for count, price in points if math.isfinite(price)]
        finite = finite or bool(known)
        axes.plot(
            *([list(column) for column in zip(*known, strict=True)] or [[], []]),
            color=color,
            linewidth=2,
            label=name,
        )
    if finite:
        axes.legend(frameon=False, loc="upper right")
        axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "no finite epsilon", ha="center", color=_INK, transform=axes.transAxes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _price_panel(axes: Axes, report: Report) -> None:
    _dress(axes, f"epsilon spent (delta {report.delta:g})")
    points = [(step, epsilon) for step, epsilon, _ in report.curve if math.isfinite(epsilon)]
    if len(points) < 2:
        axes.text(
            0.5, 0.5, "no noise: epsilon is infinite", ha="center", color=_INK, transform=axes.transAxes
        )
        return
    steps, prices = zip(*points, strict=True)
    axes.plot(steps, prices, drawstyle="steps-pre", color=_BLUE, linewidth=2)
    axes.fill_between(steps, prices, step="pre", color=_BLUE, alpha=0.10, linewidth=0)
    if report.budget is not None:
        axes.axhline(report.budget, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            f"budget {report.budget:g}",
            (0, report.budget),
            xytext=(4, 4),
            textcoords="offset points",
            color=_GREY,
            fontsize=9,
        )
    axes.set_ylim(0, 1.15 * max(*prices, report.budget or 0))


def _loss_panel(axes: Axes, losses: list[tuple[int, float]]) -> None:
    _dress(axes, "validation loss (nats per token)")
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, color=_ORANGE, linewidth=2, marker="o", markersize=4.5)
    for place in (0, -1):
        axes.annotate(
            f"{values[place]:.3f}",
            (steps[place], values[place]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="left" if place == 0 else "right",
            color=_INK,
            fontsize=9,
        )
    axes.margins(x=0.03, y=0.18)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK, pad=10)
    axes.set_xlabel("step", color=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=_GREY, length=0)
    axes.grid(axis="y", color="#e3e7ee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9d0db")
