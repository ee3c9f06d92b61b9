# SPDX-License-Identifier: Apache-2.0
"""How tight, how fast, how often wrong are accountants: ours and those of others: `python -m benchmarks.accounting`.

Every price is asked in a process of its own under a limit of time and memory. A certified lower bound
(`accountants.floor`) stands beside it: what lies below it is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accountants import calibrate
from accountants.floor import lower_epsilon
from benchmarks.chart import draw
from benchmarks.limits import Outcome, limited
from benchmarks.pricing import OURS, PEERS, Run, event
from benchmarks.report import command_line, default_path, described, surroundings, table, write
from benchmarks.schedules import SETTINGS, Setting, wandering
from benchmarks.verdicts import LOOSE, Row, assertions, summary, verdict

MEMORY = 8 << 30
FINE = "dp-accounting PLD 1e-5"
_BUDGETS = (
    (2.0, 1e-5, 0.01, 1000),
    (0.05, 1e-6, 0.01, 1000),
    (8.0, 1e-5, 0.5, 100),
    (0.005, 1e-6, 0.001, 1000),
    (1e-6, 1e-5, 0.01, 1000),
    (1000.0, 1e-5, 0.01, 1000),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accounting", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of one price")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first so many")
    parser.add_argument("--peers", type=Path, help="take the peers' figures from this report's .json")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--out", type=Path, help="default: benchmarks/accounting_<processor>_<date>.md")
    return parser.parse_args()


def progress(console_text: str) -> Progress:
    return Progress(TextColumn(console_text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def measured(setting: Setting, seconds: float, known: Mapping[str, Outcome] | None, peers: bool) -> Row:
    """All prices of one setting, and its lower bound."""
    outcomes = {
        name: limited(lambda p=price: p(setting.runs, setting.delta), seconds=seconds, memory=MEMORY)
        for name, price in OURS.items()
    }
    for name, price in PEERS.items() if peers else ():
        coarse = outcomes.get("dp-accounting PLD")
        if known is not None:
            outcomes[name] = known[name]
        elif name == FINE and coarse is not None and coarse.seconds > 3:
            outcomes[name] = Outcome(None, 0.0, "not tried")
        else:
            outcomes[name] = limited(
                lambda p=price: p(setting.runs, setting.delta), seconds=seconds, memory=MEMORY
            )
    lower = limited(lambda: lower_epsilon(event(setting.runs), setting.delta), seconds=seconds, memory=MEMORY)
    return Row(setting, lower.value or 0.0, outcomes)


def earlier(path: Path | None) -> dict[Setting, dict[str, Outcome]]:
    """The outcomes of an earlier report by setting."""
    if path is None:
        return {}
    rows = json.loads(path.read_text())["settings"]
    return {
        Setting(row["sigma"], row["q"], row["steps"], row["delta"]): {
            name: Outcome(**outcome) for name, outcome in row["methods"].items()
        }
        for row in rows
    }


def speed(seconds: float, peers: bool) -> list[tuple[str, str, Outcome]]:
    """Long and many-valued schedules: what is priced, by whom, and how that went."""
    many, fewer = wandering(500, 20), wandering(500, 4)
    distinct = tuple(Run(1 + i / 1000, 0.01, 1) for i in range(1000))
    jobs: list[tuple[str, str, Callable[[], float]]] = []
    schedules = {
        "1000 equal steps": (Run(1.0, 0.01, 1000),),
        "500 x 20 steps": many,
        "1000 distinct": distinct,
    }
    for text, runs in schedules.items():
        jobs += [(text, name, lambda p=price, r=runs: p(r, 1e-5)) for name, price in OURS.items()]
    text = "500 x 20 steps"
    jobs.append((text, "lower bound", lambda: lower_epsilon(event(many), 1e-5)))
    for name, price in (OURS | (PEERS if peers else {})).items():
        jobs.append(("500 x 4 steps", name, lambda p=price: p(fewer, 1e-5)))
    return [(text, name, limited(call, seconds=seconds, memory=MEMORY)) for text, name, call in jobs]


def calibrations(seconds: float) -> list[tuple[str, str, Outcome]]:
    """The smallest noise multipliers for some budgets, by each of our accountants."""
    found = []
    for epsilon, delta, rate, steps in _BUDGETS:
        text = f"epsilon {epsilon:g}, delta {delta:g}, rate {rate:g}, {steps} steps"
        for name in ("rdp", "prv", "pld"):

            def call(name: str = name, e: float = epsilon, d: float = delta, q: float = rate, n: int = steps) -> float:  # fmt: skip
                return calibrate.noise_multiplier(
                    epsilon=e, delta=d, sampling_rate=q, steps=n, accountant=name
                )

            found.append((text, name, limited(call, seconds=seconds, memory=MEMORY)))
    return found


def settings_table(rows: Iterable[Row], names: Iterable[str]) -> str:
    names = list(names)
    lines = []
    for row in rows:
        s = row.setting
        cells = [
            f"{s.sigma:g}",
            f"{s.q:g}",
            f"{s.steps}",
            f"{s.delta:g}",
            f"{row.lower:.6g}" if row.lower else "-",
        ]
        lines.append(cells + [verdict(row, name) for name in names])
    return table(["sigma", "q", "steps", "delta", "lower", *names], lines)


def timed_table(figures: Iterable[tuple[str, str, Outcome]], value: str) -> str:
    rows = [
        (text, name, "-" if o.value is None else f"{o.value:.6g}", o.failure or f"{o.seconds:.3f}")
        for text, name, o in figures
    ]
    return table(("what", "accountant", value, "seconds"), rows)


def markdown(options: argparse.Namespace, rows: list[Row], around: dict[str, object], timed: tuple[list, list], picture: str, minutes: float) -> str:  # fmt: skip
    names = list(rows[0].outcomes)
    checks = "\n".join(f"- {'holds' if ok else '**FAILS**'}: {text}" for text, ok in assertions(rows))
    return "\n\n".join([
        "# Accounting: tightness, speed, failures",
        described(around),
        f"`{command_line('benchmarks.accounting', sys.argv[1:])}` took {minutes:.1f} minutes; one call at a time, each "
        f"in a fork of its own, {options.seconds:g} s and {MEMORY >> 30} GB at most. Peers with their defaults (Opacus PRV "
        "and prv-accountant: error 0.01, delta error delta / 1000, the upper end); add or remove one record; "
        f"`{FINE}` has the discretisation 1e-5 and is *not tried* where the default took seconds."
        + (" The peers' figures are those of an earlier run, on the same machine under load." if options.peers else ""),
        "## Summary",
        summary(rows),
        "Looseness: epsilon over the tightest upper bound that is not below the lower bound, less one. *Loose*: more "
        f"than {LOOSE:.0%}. *Wrong*: below the lower bound. Lower bounds: `accountants.floor`; - where none was found.",
        f"![looseness and seconds by method]({picture})",
        "## Assertions",
        checks,
        "## Settings",
        "Epsilon; (x1.03) is its ratio to the tightest upper bound, where it is above 1.0005; † the library warned.",
        settings_table(rows, names),
        "## Schedules",
        "`500 x 20 steps`: 10,000 steps with 500 distinct noise multipliers between 0.6 and 2 at rate 0.01, delta 1e-5.",
        timed_table(timed[0], "epsilon"),
        "## Calibration: the smallest noise multiplier",
        timed_table(timed[1], "noise multiplier"),
    ])  # fmt: skip


def main() -> None:
    started = time.perf_counter()
    options = arguments()
    for price in (OURS if options.no_peers else OURS | PEERS).values():
        price((Run(1.0, 0.01, 10),), 1e-5)  # imports and tables, once
    known, rows = earlier(options.peers), []
    with progress("settings") as bar:
        for setting in bar.track(SETTINGS[: options.settings]):
            rows.append(measured(setting, options.seconds, known.get(setting), not options.no_peers))
    timed = speed(options.seconds, not options.no_peers), calibrations(options.seconds)
    out = options.out or default_path("accounting")
    draw(rows, out.with_suffix(".png"))
    minutes = (time.perf_counter() - started) / 60
    around = surroundings() | {"threads": 1}
    figures: dict[str, object] = {
        "command": command_line("benchmarks.accounting", sys.argv[1:]),
        "surroundings": around,
        "settings": [
            {**row.setting._asdict(), "lower": row.lower}
            | {"methods": {name: asdict(outcome) for name, outcome in row.outcomes.items()}}
            for row in rows
        ],
        "speed": [(text, name, asdict(outcome)) for text, name, outcome in timed[0]],
        "calibration": [(text, name, asdict(outcome)) for text, name, outcome in timed[1]],
        "assertions": dict(assertions(rows)),
        "minutes": minutes,
    }
    write(out, markdown(options, rows, around, timed, out.with_suffix(".png").name, minutes), figures)
    failed = Counter(ok for _, ok in assertions(rows))[False]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
