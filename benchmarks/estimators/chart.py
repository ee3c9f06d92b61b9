# SPDX-License-Identifier: Apache-2.0
"""The picture: a panel for each task, a line for each estimator, a colour for each epsilon."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.estimators.report import Outcome
from benchmarks.estimators.stepping import FLOOR

_COLOURS = ("#d9622b", "#2f6fde", "#3a9b6a", "#8a4fbf")


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the picture: mean and standard deviation, the seeds as faint dots, plain clipping as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(outcomes))
    rows = -(-len(outcomes) // columns)
    height = max(len(outcome.estimators) for outcome in outcomes) * 0.32 + 1.2
    figure = Figure(figsize=(6.2 * columns, height * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, outcome in zip(panels, outcomes, strict=False):
        _panel(panel, outcome)
    for panel in panels[len(outcomes) :]:
        panel.set_visible(False)
    panels[0].legend(loc="best", fontsize=9)
    figure.suptitle("Gradient estimators at the same (epsilon, delta); dashed: plain clipping")
    figure.savefig(path, metadata={"Software": None})


def _panel(panel, outcome: Outcome) -> None:
    score, names = outcome.plan.scores[0], outcome.estimators
    for number, epsilon in enumerate(outcome.epsilons):
        colour = _COLOURS[number % len(_COLOURS)]
        offset = 0.16 * (1 - 2 * number) if len(outcome.epsilons) == 2 else 0.0
        first = True
        for place, name in enumerate(names):
            values = [v for v in outcome.values(score, (name, epsilon)) if math.isfinite(v)]
            if not values:
                continue
            mean = statistics.mean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            label = f"epsilon {epsilon:g}" if first else None
            y = place + offset
            panel.errorbar(mean, y, xerr=spread, fmt="o", color=colour, markersize=5, capsize=2, label=label)
            panel.scatter(values, [y] * len(values), s=7, color=colour, alpha=0.35, linewidths=0)
            if name == FLOOR:
                panel.axvline(mean, color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
            first = False
    shown = [name.replace(f"steps={outcome.plan.steps},", "") for name in names]
    panel.set_yticks(range(len(names)), shown, fontsize=9)
    panel.invert_yaxis()
    if outcome.plan.lower:
        panel.set_xscale("log")
        from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter

        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%.2g"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(f"{score} ({'less' if outcome.plan.lower else 'more'} is better)")
    panel.set_title(outcome.plan.title, fontsize=11)
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
