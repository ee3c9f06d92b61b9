# SPDX-License-Identifier: Apache-2.0
"""The report of membership attacks: a table, a picture of all ROC curves, JSON and one HTML page.

The law of this file: no area under a curve stands without its interval, none is called a guarantee, and no record and no
score of a single record is written.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpopt.attacks.battery import AttackReport
from dpopt.attacks.curves import Interval, roc
from dpopt.reports.report import page

_COLORS = (
    "#2f6fde", "#d9622b", "#2e9e6b", "#8a4fbf", "#c2185b", "#00838f", "#7a6a00", "#5d4037", "#607d8b", "#e0a100", "#3949ab",
)  # fmt: skip
_READING = (
    "Areas and rates describe these attacks on these records. They are no guarantee: a stronger attack may find more, and "
    "an area of one half over all records may hide a few that are found every time, which is why the rates at few false "
    "alarms stand beside it. The lower bounds hold together, and only if each record was a member by its own fair coin."
)


def to_json(report: AttackReport) -> str:
    """As JSON, without scores of single records; an infinite number is the string "infinity"."""
    data = {
        "num_members": int(report.member.sum()),
        "num_non_members": int((~report.member).sum()),
        "confidence": report.confidence,
        "delta": report.delta,
        "attacks": [
            {
                "name": name,
                "auc": one.auc._asdict(),
                "tpr_at_fpr": {f"{rate:g}": found._asdict() for rate, found in one.tpr.items()},
                "epsilon_at_least": one.bound.epsilon if math.isfinite(one.bound.epsilon) else "infinity",
                "could_show": one.bound.largest_possible
                if math.isfinite(one.bound.largest_possible)
                else "infinity",
                "observed": one.bound.observed,
            }
            for name, one in report.attacks.items()
        ],
        "assumptions": list(_assumptions(report)),
        "controls": {name: one._asdict() for name, one in report.controls.items()},
        "about": dict(report.about),
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def rows(report: AttackReport) -> list[tuple[str, ...]]:
    """One row of text for each attack: name, area, a rate for each false-positive rate, lower bound."""
    return [
        (
            name,
            told(one.auc, 3),
            *(percent(found) for found in one.tpr.values()),
            f"{math.floor(one.bound.epsilon * 100) / 100:.2f}"
            if math.isfinite(one.bound.epsilon)
            else "infinity",
        )
        for name, one in report.attacks.items()
    ]


def heads(report: AttackReport) -> tuple[str, ...]:
    """What the columns of `rows` are."""
    rates = next(iter(report.attacks.values())).tpr
    return ("attack", "AUC", *(f"TPR at {100 * rate:g} % FPR" for rate in rates), "epsilon, at least")


def warnings(report: AttackReport) -> list[str]:
    """What a reader must know before believing a number."""
    said = [
        f"the two sets differ by themselves: {name} tells them apart with an AUC of {told(report.controls[name], 3)}; the "
        "attacks may have found that difference, and no lower bound holds; draw members and non-members by coins"
        for name in report.suspicious_controls
    ]
    least = min(next(iter(report.attacks.values())).tpr)
    needed = math.ceil(math.log(4 / (1 - report.confidence)) / least)
    if int((~report.member).sum()) < needed:
        said.append(
            f"{int((~report.member).sum())} non-members cannot tell where {100 * least:g} % of false positives lies "
            f"({needed} could): the low end of that rate is 0 whatever the attack"
        )
    return said


def told(interval: Interval, digits: int) -> str:
    """A value with its interval."""
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def percent(interval: Interval) -> str:
    """A rate with its interval, in percent."""
    return f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def picture(report: AttackReport) -> bytes:
    """All ROC curves on logarithmic axes, with what guessing would do; a PNG."""
    figure = Figure(figsize=(6.4, 5.0), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    floor = 0.5 / max(int((~report.member).sum()), int(report.member.sum()))
    line = np.geomspace(floor, 1, 50)
    axes.plot(line, line, color="#8a94a6", linewidth=1, linestyle=(0, (4, 3)), label="guessing")
    for (name, one), color in zip(report.attacks.items(), _COLORS, strict=False):
        curve = roc(one.scores, report.member)
        axes.step(
            np.maximum(curve.false_positives, floor), np.maximum(curve.true_positives, floor),
            where="post", color=color, linewidth=1.6, label=f"{name} ({one.auc.value:.3f})",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(floor, 1)
    axes.set_ylim(floor, 1)
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    axes.legend(frameon=False, fontsize=8, loc="lower right", title="attack (AUC)", title_fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(which="major", color="#e3e7ee", linewidth=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def to_html(report: AttackReport) -> str:
    """As one HTML page that needs nothing else."""
    escape = html.escape
    cells = ["".join(f"<th>{escape(head)}</th>" for head in heads(report))]
    cells += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows(report)]
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    image = base64.b64encode(picture(report)).decode()
    numbers = f"{int(report.member.sum()):,} members and {int((~report.member).sum()):,} non-members"
    body = [
        "<h1>Membership attacks</h1>",
        f"<p>{numbers}. Intervals at {100 * report.confidence:g} %; lower bounds on epsilon at delta {report.delta:g}.</p>",
        *(f"<p><strong>Warning:</strong> {escape(warning)}.</p>" for warning in warnings(report)),
        f'<table class="wide">{table}</table>',
        f"<p>{escape(_READING)}</p>",
        f'<p><img alt="ROC curves on logarithmic axes" src="data:image/png;base64,{image}"></p>',
        "<h2>What the bounds assume</h2>",
        "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in _assumptions(report)) + "</ul>",
        "<h2>Controls</h2>",
        "<p>What tells the two sets apart without the model under attack: an AUC whose interval does not hold 0.5 means "
        "that they differ by themselves.</p>",
        "<ul>" + "".join(f"<li>{escape(n)}: {told(c, 3)}</li>" for n, c in report.controls.items()) + "</ul>",
        "<h2>What was attacked</h2>",
        "<ul>"
        + "".join(f"<li>{escape(n)}: {escape(str(v))}</li>" for n, v in report.about.items())
        + "</ul>",
    ]
    return page("Membership attacks", body)


def _assumptions(report: AttackReport) -> tuple[str, ...]:
    first = next(iter(report.attacks.values())).bound
    paid = f"each of {len(report.attacks)} attacks is bounded at {100 * first.confidence:.4g} %, so that all bounds hold "
    return (*first.assumptions, paid + f"together at {100 * report.confidence:g} %")
