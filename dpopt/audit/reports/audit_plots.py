# SPDX-License-Identifier: Apache-2.0
"""The pictures of an audit: lower bounds beside the claim, the scores by coin, and how well they tell the coins apart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.evidence import Evidence, FloatArray
from dpopt.audit.reports.verdict import Claim, rounded_down
from dpopt.reports.report import rounded_up

_INK, _GREY, _BLUE, _ORANGE = "#1c2430", "#8a94a6", "#2f6fde", "#d9622b"


def bounds_picture(claim: Claim, bounds: Sequence[LowerBound]) -> bytes:
    """Each lower bound as a bar, what it could have shown as a mark, the claim as a line; a PNG."""
    figure, (axes,) = _figure(1, (9.6, 0.8 + 0.46 * len(bounds)))
    finite = [b.epsilon for b in bounds if math.isfinite(b.epsilon)]
    ends = [*finite, claim.epsilon if math.isfinite(claim.epsilon) else 0.0]
    width = 1.25 * max(*ends, 0.4)
    for row, bound in enumerate(reversed(bounds)):
        over = bound.epsilon > claim.epsilon
        axes.barh(row, min(bound.epsilon, width), height=0.5, color=_ORANGE if over else _BLUE)
        axes.annotate(
            "no limit" if math.isinf(bound.epsilon) else rounded_down(bound.epsilon),
            (min(bound.epsilon, width), row), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, color=_INK,
        )  # fmt: skip
        if bound.largest_possible <= width:
            axes.plot([bound.largest_possible] * 2, [row - 0.32, row + 0.32], color=_GREY, linewidth=1.5)
    if math.isfinite(claim.epsilon):
        axes.axvline(claim.epsilon, color=_INK, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            f"claim {rounded_up(claim.epsilon)}", (claim.epsilon, -0.5), xytext=(4, 3),
            textcoords="offset points", fontsize=9, color=_INK,
        )  # fmt: skip
    axes.set_yticks(range(len(bounds)), [bound.title for bound in reversed(bounds)])
    axes.set_xlim(0, width)
    axes.set_ylim(-0.6, len(bounds) - 0.5)
    _dress(
        axes, f"epsilon at delta {claim.delta:g}, at least (grey: what perfect scores would show)", "", "x"
    )
    axes.tick_params(axis="y", labelcolor=_INK)
    return _png(figure)


def scores_picture(evidence: Evidence) -> bytes:
    """The scores by coin on the left; on the right the ROC curve on logarithmic axes; a PNG."""
    figure, (left, right) = _figure(2, (9.6, 3.2))
    finite = evidence.scores[np.isfinite(evidence.scores)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    sides = ((~evidence.included, _GREY, "left out"), (evidence.included, _BLUE, "took part"))
    for side, color, name in sides:
        shown = np.clip(evidence.scores[side], edges[0], edges[-1])
        left.hist(shown, bins=list(edges), color=color, alpha=0.55, label=f"{name} ({int(side.sum()):,})")
    left.legend(frameon=False, fontsize=9, loc="upper left")
    _dress(left, evidence.kind, "score", "y")
    false, true = _rates(evidence)
    smallest = 0.5 / max(1, evidence.num_records - evidence.num_included)
    right.plot([smallest, 1], [smallest, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    right.plot(np.maximum(false, smallest), np.maximum(true, smallest), color=_BLUE, linewidth=2)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlim(smallest, 1)
    right.set_ylim(smallest, 1.1)
    _dress(right, "true positive rate", "false positive rate", "both")
    return _png(figure)


def _rates(evidence: Evidence) -> tuple[FloatArray, FloatArray]:
    """False and true positive rates at every threshold, from the highest; equal scores are one threshold."""
    order = np.argsort(-evidence.scores, kind="stable")
    scores, included = evidence.scores[order], evidence.included[order]
    last = np.append(scores[1:] != scores[:-1], True)
    true = np.cumsum(included)[last] / max(1, evidence.num_included)
    false = np.cumsum(~included)[last] / max(1, evidence.num_records - evidence.num_included)
    return np.append(0.0, false), np.append(0.0, true)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=size, dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _dress(axes: Axes, title: str, along: str, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK, pad=10)
    axes.set_xlabel(along, color=_GREY)
    axes.tick_params(which="both", colors=_GREY, length=0)
    axes.grid(axis=grid, color="#e3e7ee", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9d0db")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
