# SPDX-License-Identifier: Apache-2.0
"""The commands that price: epsilon of a plan or of a ledger, and the parameter that fits a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from accountants import (
    ADD_REMOVE,
    Composed,
    Curve,
    Event,
    Gaussian,
    History,
    PoissonSampled,
    Repeated,
    UnpricedEvent,
    calibrate,
    ledger_bound,
)
from accountants.ledger.ledger_bound import known_relation
from accountants.registry import ACCOUNTANTS, DEFAULT
from accountants.registry import accountant as named
from dpopt.cli.failures import BUDGET, INPUT, exit_codes
from dpopt.cli.reading import ledger_at, patience, runs
from dpopt.reports.report import rounded_up

NAMES = ", ".join(sorted(ACCOUNTANTS))
_POINTS = 40
_SAMPLING_IGNORED = (
    "zcdp takes no account of sampling: it is for full batches and whole epochs, and large elsewhere"
)

_NOISE = typer.Option(help="Noise / clip norm.")
_RATE = typer.Option(help="Probability that a record takes part in a step: batch size / number of records.")
_STEPS = typer.Option(help="Number of steps.")
_DELTA = typer.Option(help="The delta of the bound; below 1 / number of records.")
_BUDGET = typer.Option(help="The budget.")
_ONE = typer.Option(help=f"Print the number of this one alone: {NAMES}. (default: a table of all)")


def epsilon(
    delta: Annotated[float, _DELTA],
    noise_multiplier: Annotated[float | None, _NOISE] = None,
    sampling_rate: Annotated[float | None, _RATE] = None,
    steps: Annotated[int | None, _STEPS] = None,
    ledger: Annotated[Path | None, typer.Option(help="Price what this ledger charges instead.")] = None,
    accountant: Annotated[str | None, _ONE] = None,
    plot: Annotated[Path | None, typer.Option(help="Write epsilon over steps (or charges) as a PNG.")] = None,
) -> None:
    """Print upper bounds on epsilon of Poisson-sampled Gaussian steps, or of everything on a ledger.

    Exit code 2 where an accountant has no price for something.
    """
    errors = Console(stderr=True)
    with exit_codes(errors):
        _check_picture(plot)
        relation = ADD_REMOVE
        if ledger is not None:
            if (noise_multiplier, sampling_rate, steps) != (None, None, None):
                raise ValueError(
                    "a ledger or a plan must be given; got both; leave the options of the plan out"
                )
            history = ledger_at(ledger, errors)
            if history.rule is not None:
                _print_guarantee(history, delta, accountant, plot)
                return
            releases, unit, relation = runs(history), "charges", known_relation(history)
        elif noise_multiplier is None or sampling_rate is None or steps is None:
            raise ValueError(
                "--noise-multiplier, --sampling-rate and --steps must be given, or --ledger; got less; add the others"
            )
        else:
            step = PoissonSampled(sampling_rate, Gaussian(noise_multiplier))
            releases, unit = ((step, Repeated(step, steps).count),), "steps"
        title = f"{ledger or 'The plan'}: {sum(count for _, count in releases)} {unit}, delta {delta:g}"
        with patience(errors, f"pricing {len(releases)} different mechanisms"):
            unpriced = _print_prices(releases, delta, accountant, title, relation)
            if plot is not None:
                _plot(releases, delta, accountant, unit, plot, relation)
    if unpriced:
        raise typer.Exit(INPUT)


def noise_multiplier(
    epsilon: Annotated[float, _BUDGET],
    sampling_rate: Annotated[float, _RATE],
    steps: Annotated[int, _STEPS],
    delta: Annotated[float, _DELTA],
    accountant: Annotated[str, typer.Option(help=f"One of {NAMES}.")] = DEFAULT,
) -> None:
    """Print the smallest noise multiplier that keeps Poisson-sampled Gaussian steps within a budget."""
    errors = Console(stderr=True)
    with exit_codes(errors), patience(errors, f"looking for the noise by {accountant}"):
        found = calibrate.noise_multiplier(
            epsilon=epsilon, sampling_rate=sampling_rate, steps=steps, delta=delta, accountant=accountant
        )
        typer.echo(upwards(found))


def calibration(
    epsilon: Annotated[float, _BUDGET],
    delta: Annotated[float, _DELTA],
    noise_multiplier: Annotated[float | None, _NOISE] = None,
    sampling_rate: Annotated[float | None, _RATE] = None,
    steps: Annotated[int | None, _STEPS] = None,
    accountant: Annotated[str | None, _ONE] = None,
) -> None:
    """Solve for the one of noise multiplier, sampling rate and steps that is not given, within a budget.

    Exit code 3 where an accountant finds none.
    """
    errors = Console(stderr=True)
    with exit_codes(errors):
        if [noise_multiplier, sampling_rate, steps].count(None) != 1:
            raise ValueError(
                "two of --noise-multiplier, --sampling-rate and --steps must be given; "
                f"got {3 - [noise_multiplier, sampling_rate, steps].count(None)}; leave out the one to solve for"
            )
        solve, what = _solver(epsilon, delta, noise_multiplier, sampling_rate, steps)
        with patience(errors, f"solving for the {what}"):
            if accountant is not None:
                typer.echo(solve(accountant)[0])
                return
            table = Table("accountant", what, "epsilon", title=f"epsilon {epsilon:g} at delta {delta:g}")
            failed, told = _solved_rows(table, solve)
        Console().print(table)
        for text in told:
            Console().print(f"- {escape(text)}", highlight=False)
    if failed:
        raise typer.Exit(BUDGET)


def _solved_rows(table: Table, solve: Callable[[str], tuple[str, str]]) -> tuple[bool, list[str]]:
    """Fill the table, a row for each accountant: whether one found nothing, and what is odd about the rows."""
    failed, told = False, []
    for name in sorted(ACCOUNTANTS):
        try:
            value, price = solve(name)
        except ValueError as error:
            failed = True
            table.add_row(name, "-", escape(str(error)))
            continue
        table.add_row(name, value, price)
        if table.columns[1].header == "steps" and value == "0":
            told.append(f"{name}: not one step fits the budget; add noise, lower the rate or raise epsilon")
    return failed, [*told, _SAMPLING_IGNORED]


def _solver(
    epsilon: float, delta: float, noise: float | None, rate: float | None, steps: int | None
) -> tuple[Callable[[str], tuple[str, str]], str]:
    """Return what finds the missing parameter by an accountant's name, with its price, and the parameter's name."""

    def solve(name: str) -> tuple[str, str]:
        sigma, q, n = noise, rate, steps
        if sigma is None and q is not None and n is not None:
            found = calibrate.noise_multiplier(
                epsilon=epsilon, delta=delta, sampling_rate=q, steps=n, accountant=name
            )
            shown = upwards(found)
            sigma = float(shown)
        elif q is None and sigma is not None and n is not None:
            found = calibrate.sampling_rate(
                epsilon=epsilon, delta=delta, noise_multiplier=sigma, steps=n, accountant=name
            )
            shown = f"{found * (1 - 1e-6):.6g}" if found < 1 else "1"
            q = float(shown) if float(shown) <= found else found
            shown = f"{q:.6g}"
        else:
            assert q is not None and sigma is not None
            event = PoissonSampled(q, Gaussian(sigma))
            n = calibrate.num_steps(event=event, epsilon=epsilon, delta=delta, accountant=name)
            shown = str(n)
        price = calibrate.epsilon(
            noise_multiplier=sigma, sampling_rate=q, steps=n or 0, delta=delta, accountant=name
        )
        return shown, upwards(price)

    missing = {"noise multiplier": noise, "sampling rate": rate, "steps": steps}
    return solve, next(name for name, value in missing.items() if value is None)


def _curve(
    releases: tuple[tuple[Event, int], ...], name: str, relation: str, count: int | None = None
) -> Curve:
    """Return the curve of all releases, or of the first `count`."""
    parts, left = [], sum(n for _, n in releases) if count is None else count
    for event, n in releases:
        parts.append(Repeated(event, min(n, left)))
        left -= parts[-1].count
    return named(name, relation).curve(Composed(tuple(part for part in parts if part.count)))


def _print_guarantee(history: History, delta: float, accountant: str | None, plot: Path | None) -> None:
    """Print what the filter of a ledger guarantees: there is no price of what happened, and no way to it."""
    if plot is not None:
        raise ValueError(
            "a ledger to be plotted must have a schedule that was fixed in advance; got one that a filter governs, whose "
            "guarantee does not grow with its charges; leave --plot out"
        )
    bound = ledger_bound(history, delta, accountant=None if accountant is None else named(accountant))
    typer.echo(f"{upwards(bound.epsilon)} ({bound.method}: the guarantee, however much was spent)")
    for text in bound.assumptions:
        Console().print(f"- {escape(text)}", highlight=False)


def _print_prices(
    releases: tuple[tuple[Event, int], ...], delta: float, one: str | None, title: str, relation: str
) -> bool:
    """Print the prices; return whether an accountant has none."""
    if one is not None:
        typer.echo(upwards(_curve(releases, one, relation).epsilon(delta)))
        return False
    table = Table("accountant", "epsilon, at most", "method", "adaptive", title=escape(title))
    assumptions: dict[str, None] = {}
    unpriced = False
    for name in sorted(ACCOUNTANTS):
        try:
            bound = _curve(releases, name, relation).bound(delta)
        except UnpricedEvent as error:
            unpriced = True
            table.add_row(name, "-", escape(str(error)), "")
            continue
        fits = "schedule may depend on outputs, inside a Filter" if named(name).adaptive else "no"
        table.add_row(name, upwards(bound.epsilon), bound.method, fits)
        assumptions |= dict.fromkeys(
            f"{text} ({name})" if "conjecture" in text or "dominates" in text else text
            for text in bound.assumptions
        )
    console = Console()
    console.print(table)
    for text in (*assumptions, _SAMPLING_IGNORED):
        console.print(f"- {escape(text)}", highlight=False)
    return unpriced


def upwards(value: float) -> str:
    """Write a number never below `value`: to 4 digits after the point, or 4 in all where it is small."""
    if value >= 0.001 or value <= 0:
        return rounded_up(value, 4)
    scale = 10.0 ** (math.floor(math.log10(value)) - 3)
    shown = math.ceil(value / scale)
    return next(text for up in (0, 1, 2) if float(text := f"{(shown + up) * scale:.3e}") >= value)


def _check_picture(path: Path | None) -> None:
    """Refuse a place for a picture before anything is priced for it."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ValueError(f"a picture must go to a file; got the folder or named pipe {path}; name a file")
    if not path.parent.is_dir():
        raise ValueError(
            f"a picture must go into a folder that is there; got {path.parent}; make it, or name another"
        )


def _plot(
    releases: tuple[tuple[Event, int], ...],
    delta: float,
    one: str | None,
    unit: str,
    path: Path,
    relation: str,
) -> None:
    """Write epsilon over the number of releases: the tightest accountant and the Renyi bound, or `one`."""
    from dpopt.reports.plots import prices

    total = sum(count for _, count in releases)
    counts = sorted({max(1, round(total * i / _POINTS)) for i in range(1, _POINTS + 1)}) if total else []
    lines: dict[str, list[tuple[int, float]]] = {}
    for name in (one,) if one is not None else (DEFAULT, "rdp"):
        lines[name] = [(n, _curve(releases, name, relation, n).epsilon(delta)) for n in counts]
    path.write_bytes(prices(lines, delta=delta, unit=unit))
    Console(stderr=True).print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)
