# SPDX-License-Identifier: Apache-2.0
"""The report of a private training run: what is claimed, on which assumptions, and what came out.

The law of this file: a report holds public numbers only, and an infinite epsilon is written as such. JSON for
machines; Markdown and a self-contained HTML page for people, rendered from the same sections.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. Losses are in nats per token on validation data that somebody declared public, else None."""

    title: str
    unit: str
    neighbouring_relation: str
    epsilon: float
    delta: float
    epsilon_method: str
    assumptions: tuple[str, ...]
    accountant: str
    budget: float | None
    sampler: str
    sampling_rate: float
    expected_batch_size: float
    steps: int
    steps_planned: int
    stopped: str | None
    noise_multiplier: float
    clip_norm: float
    estimator: str
    guarantee: str
    dtype: str
    device: str
    randomness: str
    insecure_seed: int | None
    floating_point: str
    scope: str
    limitations: tuple[str, ...]
    num_records: int
    data: str
    validation: str
    num_validation: int
    loss_before: float | None
    loss_after: float | None
    model: str
    tuning: str
    saved_as: str
    num_parameters: int
    num_trainable: int
    learning_rate: float
    optimizer: str
    physical_batch_size: int
    max_tokens: int
    model_seed: int
    seconds: float
    ledger: str
    ledger_id: str
    ledger_head: str
    ledger_charges: int
    ledger_charges_before: int
    versions: Mapping[str, str]
    curve: tuple[tuple[int, float, float | None], ...]
    """(step, upper bound on epsilon, loss) over the run."""
    audit: str | None = None
    """The canaries in the run, whose traces `dpopt audit` looks for."""

    def to_json(self) -> str:
        """As JSON; an infinite number is the string "infinity"."""
        return json.dumps(_plain(asdict(self)), indent=2, allow_nan=False) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: "infinity", "none", or `digits` significant digits and no exponent near 1."""
    if value is None:
        return "none"
    if math.isinf(value):
        return "infinity"
    return f"{value:.{digits}g}" if abs(value) < 1e-3 or abs(value) >= 1e6 else _trimmed(value, digits)


def sure(epsilon: float) -> str:
    """How sure, in percent, an undecided attacker can become at most about one record's presence."""
    share = 100 / (1 + math.exp(-min(epsilon, 500)))
    return f"{rounded_up(share, 1 if share < 99.9 else 2)} %"


def rounded_up(value: float, digits: int = 2) -> str:
    """An epsilon for people: never below the bound."""
    if math.isinf(value):
        return "infinity"
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def to_markdown(report: Report, *, picture: str) -> str:
    """As Markdown, with the picture beside it."""
    lines = [f"# {report.title}", "", *_paragraphs(report), f"![epsilon and loss over steps]({picture})", ""]
    for title, rows in _sections(report).items():
        lines += [f"## {title}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
        lines.append("")
    for title, points in _lists(report).items():
        lines += [f"## {title}", "", *(f"- {point}" for point in points), ""]
    return "\n".join(lines)


def to_html(report: Report, picture: bytes) -> str:
    """As one HTML page that needs nothing else; `picture` is a PNG."""
    escape = html.escape
    body = [f"<h1>{escape(report.title)}</h1>"]
    body += [f"<p>{_bold(escape(text))}</p>" for text in _paragraphs(report) if text]
    encoded = base64.b64encode(picture).decode()
    body.append(f'<img alt="epsilon and loss over steps" src="data:image/png;base64,{encoded}">')
    for title, rows in _sections(report).items():
        cells = (f"<tr><th>{escape(n)}</th><td>{escape(v).replace('`', '')}</td></tr>" for n, v in rows)
        body.append(f"<h2>{escape(title)}</h2><table>{''.join(cells)}</table>")
    for title, points in _lists(report).items():
        items = "".join(f"<li>{escape(point)}</li>" for point in points)
        body.append(f"<h2>{escape(title)}</h2><ul>{items}</ul>")
    return page(report.title, body)


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """One HTML page that needs nothing else, in the looks of the reports; `body` is HTML, `style` more of CSS."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}{style}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def with_section(whole: str, name: str, body: str) -> str:
    """The page `whole` with the section `name`, HTML, at its end, in place of an earlier one of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin in whole and end in whole:
        before, _, rest = whole.partition(begin)
        whole = before + rest.partition(end)[2]
    head, mark, tail = whole.rpartition("</body>")
    if not mark:
        raise ValueError(
            "expected a page of dpopt's; got one without </body>; leave reports as they were written"
        )
    return f"{head}{begin}{body}{end}{mark}{tail}"


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1c2430}"
    "img{max-width:100%}table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:600;"
    "vertical-align:top;width:14rem;padding:.3rem .8rem .3rem 0}td{padding:.3rem 0;overflow-wrap:anywhere}"
    "tr{border-top:1px solid #e3e7ee}h2{margin-top:2rem}"
)


def _paragraphs(report: Report) -> list[str]:
    unit, epsilon = report.unit, rounded_up(report.epsilon)
    if report.insecure_seed is not None:
        claim = (
            f"**This run is not private.** Its randomness came from the public seed {report.insecure_seed}, so "
            "anybody can repeat and subtract the noise. The figures below show what the same run would claim with "
            "secret randomness."
        )
    elif math.isinf(report.epsilon):
        claim = "**This run is not private.** It added no noise: epsilon is infinite. Use it to compare with only."
    else:
        claim = (
            f"**The trained weights are differentially private with epsilon {epsilon} at delta {report.delta:g}, "
            f"for each record.** One record is: {unit}. Take somebody who reads the weights and knows all other "
            f"records, and who holds it for equally likely that one given record was used or not: he can become at "
            f"most {sure(report.epsilon)} sure, but for an event of probability about {report.delta:g}. This is the "
            "worst case that is proven, against any method; a smaller epsilon promises more."
        )
    paragraphs = [claim, ""]
    if report.loss_before is not None and report.loss_after is not None:
        before, after = report.loss_before, report.loss_after
        paragraphs += [
            f"On {report.num_validation} validation records ({report.validation}) the loss per token went from "
            f"{before:.3f} to {after:.3f} nats, a perplexity of {math.exp(min(before, 99)):.1f} to "
            f"{math.exp(min(after, 99)):.1f}.",
            "",
        ]
    if report.stopped is not None:
        paragraphs += [
            f"**The run was stopped after {report.steps} of {report.steps_planned} steps** ({report.stopped}).",
            "",
        ]
    return paragraphs


def _sections(report: Report) -> dict[str, list[tuple[str, str]]]:
    budget = "none" if report.budget is None else f"{report.budget:g}"
    return {
        "The claim": [
            ("Unit of privacy", report.unit),
            ("Neighbouring data sets", report.neighbouring_relation),
            ("Epsilon", f"{rounded_up(report.epsilon, 3)} (an upper bound, by {report.epsilon_method})"),
            ("Delta", f"{report.delta:g} (1 / number of records is {1 / report.num_records:.2g})"),
            ("Budget for the ledger", f"epsilon {budget}"),
            ("What is covered", report.scope),
        ],
        "The mechanism": [
            ("Sampler that ran", report.sampler),
            (
                "Sampling rate",
                f"{number(report.sampling_rate, 4)} (expected batch {report.expected_batch_size:g})",
            ),
            ("Steps", f"{report.steps} of {report.steps_planned}"),
            ("Noise multiplier", f"{number(report.noise_multiplier, 4)} (noise / clip norm)"),
            ("Clip norm", f"{report.clip_norm:g}"),
            ("Gradient estimator", f"{report.estimator}: {report.guarantee}"),
            ("Accountant", report.accountant),
            ("Arithmetic", f"{report.dtype} on {report.device}"),
            ("Randomness", report.randomness),
        ],
        "The model and the data": [
            ("Model", report.model),
            ("Trained", f"{report.tuning}: {report.num_trainable:,} of {report.num_parameters:,} parameters"),
            ("Training data", f"{report.data}; {report.num_records:,} records"),
            ("Validation data", report.validation),
            ("Optimizer", report.optimizer),
            ("Learning rate", f"{report.learning_rate:g} at first, falling linearly to 0"),
            ("Tokens a record", f"at most {report.max_tokens}"),
            ("Physical batch", f"{report.physical_batch_size} records (no effect on the claim)"),
            ("Model seed", f"{report.model_seed} (adapter and dropout; never the noise or the sampling)"),
            ("Time", f"{report.seconds:.0f} s of training and evaluation"),
            ("Saved in", f"`{report.saved_as}/`"),
        ],
        "Evidence": [
            ("Ledger", f"`{report.ledger}`"),
            ("Ledger id", f"`{report.ledger_id}`"),
            ("Ledger head", f"`{report.ledger_head}`"),
            ("Charges", f"{report.ledger_charges}, of which {report.ledger_charges_before} before this run"),
            *(
                ()
                if report.audit is None
                else (("Audit", f"{report.audit}, among the records; ask `dpopt audit`"),)
            ),
            ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ],
    }


def _lists(report: Report) -> dict[str, tuple[str, ...]]:
    return {
        "What the bound assumes": (*report.assumptions, report.floating_point),
        "What it does not cover": report.limitations,
    }


def _bold(text: str) -> str:
    parts = text.split("**")
    return "".join(f"<b>{part}</b>" if i % 2 else part for i, part in enumerate(parts))


def _trimmed(value: float, digits: int) -> str:
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "infinity" if isinstance(value, float) and math.isinf(value) else value
