# SPDX-License-Identifier: Apache-2.0
"""The report of an audit: the claim, every lower bound beside it, the controls, and the verdict in one sentence.

The law of this file: no number stands without what it assumes and what it could have been at most, so that a low one is
not read as "private". An infinite number is written as such.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.evidence import Evidence
from dpopt.audit.reports.controls import Control
from dpopt.audit.reports.verdict import Claim, Verdict, rounded_down
from dpopt.reports.report import page, rounded_up

_ENDLESS = 1e3  # an epsilon above it is told as none


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """One audit. `confidence` is that of all bounds together; `about` is what the run measured of its canaries."""

    runs: tuple[str, ...]
    claim: Claim
    verdict: Verdict
    confidence: float
    bounds: tuple[LowerBound, ...]
    controls: tuple[Control, ...]
    evidence: tuple[Evidence, ...]
    about: Mapping[str, object]

    def to_json(self) -> str:
        """As JSON, without the scores; an infinite number is the string "infinity"."""
        data: dict[str, object] = {
            "runs": self.runs,
            "claim": asdict(self.claim),
            "verdict": {
                "sentence": self.verdict.sentence,
                "exit_code": self.verdict.exit_code,
                "bound": self.verdict.bound.title,
            },
            "confidence": self.confidence,
            "lower_bounds": [asdict(bound) for bound in self.bounds],
            "controls": [asdict(control) for control in self.controls],
            "evidence": [_summary(one) for one in self.evidence],
            "canaries": dict(self.about),
        }
        return json.dumps(_plain(data), indent=2, allow_nan=False) + "\n"


def could_show(bound: LowerBound) -> str:
    """What the bound could have shown at most, for people."""
    return "no limit" if bound.largest_possible > _ENDLESS else rounded_down(bound.largest_possible)


def to_html(report: AuditReport, bounds: bytes, scores: Sequence[bytes]) -> str:
    """As one HTML page that needs nothing else; `bounds` and `scores` are PNGs, one of scores for each evidence."""
    escape = html.escape
    title = f"Audit of {', '.join(report.runs)}"
    color = {0: "#1f7a4d", 1: "#b3261e"}.get(report.verdict.exit_code, "#8a5a00")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict" style="border-color:{color}">{escape(report.verdict.sentence)}</p>',
        f"<p>{escape(_reading(report))}</p>",
        _picture(bounds, "lower bounds beside the claim"),
        "<h2>Lower bounds</h2>",
        _table(
            ("Bound", "Epsilon, at least", "Confidence", "Could have shown", "What was seen"), _rows(report)
        ),
        "<h2>The claim</h2>",
        _pairs(
            (
                ("Epsilon, at most", f"{rounded_up(report.claim.epsilon, 3)} (by {report.claim.method})"),
                ("Delta", f"{report.claim.delta:g}"),
            )
        ),
        _list(report.claim.assumptions),
        "<h2>Controls</h2>",
        _table(
            ("Control", "Came out as it must", "What was seen"),
            [(f"{c.kind}: {c.name}", "yes" if c.passed else "NO", c.observed) for c in report.controls],
        ),
        "<h2>The evidence</h2>",
    ]
    for one, picture in zip(report.evidence, scores, strict=True):
        body += [f"<p>{escape(_told(one))}</p>", _picture(picture, f"scores: {one.kind}")]
    body += ["<h2>What each bound assumes</h2>"]
    for bound in report.bounds:
        body += [f"<p><b>{escape(bound.title)}</b></p>", _list(bound.assumptions)]
    if report.about:
        pairs = [(str(name), json.dumps(_plain(value))) for name, value in report.about.items()]
        body += ["<h2>What the canaries cost</h2>", _pairs(pairs)]
    return page(title, body, _STYLE)


def to_section(report: AuditReport, link: str) -> str:
    """What a run's own report says of its audit, as HTML; `link` leads to the whole of it."""
    rows = [(bound.title, rounded_down(bound.epsilon), could_show(bound)) for bound in report.bounds]
    return "".join(
        (
            "<h2>Audit</h2>",
            f"<p>{html.escape(report.verdict.sentence)}</p>",
            _table(("Lower bound", "Epsilon, at least", "Could have shown"), rows),
            f'<p><a href="{html.escape(link, quote=True)}">The whole audit</a></p>',
        )
    )


_STYLE = (
    ".verdict{border-left:.4rem solid;padding:.6rem 1rem;font-size:1.15rem;background:#f5f7fa}"
    "table.wide th{width:auto;padding-right:1rem}table.wide td{padding-right:1rem;vertical-align:top}"
    "table.wide td:first-child{font-weight:600}"
)


def _reading(report: AuditReport) -> str:
    return (
        "A lower bound is what was shown to leak: the truth lies between the largest of them and the claim, if the claim "
        "holds. All bounds hold together with the stated confidence. A low one does not show that a run is private: "
        "other attacks may see more, and no bound can show more than its fourth column says. At 95 % confidence one true "
        "claim in twenty is refuted by chance: repeat the run, or ask for a higher confidence, before you believe it."
    )


def _rows(report: AuditReport) -> list[tuple[str, ...]]:
    return [
        (b.title, rounded_down(b.epsilon), f"{100 * b.confidence:.4g} %", could_show(b), b.observed)
        for b in report.bounds
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f'<table class="wide"><tr>{top}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _list(points: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(point)}</li>' for point in points)}</ul>"


def _picture(data: bytes, told: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(told)}" src="data:image/png;base64,{encoded}">'


def _told(one: Evidence) -> str:
    about = f"{one.num_records:,} scores of the kind “{one.kind}”, {one.num_included:,} of them of records that took part"
    if one.num_steps is not None:
        about += f", each about one of {one.num_steps} steps at sampling rate {one.sampling_rate:g}"
    return f"{about}; {'independent' if one.independent else 'not known to be independent'} given the coins."


def _summary(one: Evidence) -> dict[str, object]:
    return {
        "kind": one.kind,
        "num_records": one.num_records,
        "num_included": one.num_included,
        "independent": one.independent,
        "noise_std": one.noise_std,
        "num_steps": one.num_steps,
        "sampling_rate": one.sampling_rate,
    }


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "infinity" if isinstance(value, float) and math.isinf(value) else value
