# SPDX-License-Identifier: Apache-2.0
"""The report of `benchmarks.audit_attacks`: tables of plain numbers, each with its interval or its bound's assumption."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Cell = dict[str, Any]


def markdown(cells: Sequence[Cell], around: str, command: str) -> str:
    """The whole report."""
    trained = [cell for cell in cells if cell["setting"]["optimizer"] == "adamw"]
    power = [cell for cell in cells if cell["setting"]["optimizer"] == "sgd"]
    one = trained[0]["setting"]
    parts = [
        "# What a fine-tuned language model gives away",
        around,
        f"`{command}`, one thread. Seconds are of one processor core (process time), on a machine that others used too.",
        f"Each model is fine-tuned (all weights, {one['steps']} steps, Poisson rate {one['rate']:g}, AdamW at "
        f"{one['learning_rate']:g} with linear decay) on the half, by fair coins, of {one['num_pool']} E2E descriptions of at "
        f"most {one['max_tokens']} tokens, with {one['num_canaries']} canaries of two tokens, the second one its own, each in "
        "by its own coin, and with secrets put in 0, 1 or 8 times. Epsilon is of one record, at delta 1e-5; a secret put in 8 "
        "times has 8 records. Infinite: neither noise nor clipping. Seeded, hence for benchmarks only.",
        "## Membership",
        _membership(trained),
        "Intervals at 95 %. `calibrated`, `RMIA` and `InfoRMIA` have the base model as their reference; `LiRA` and `shadows` "
        "have shadow models trained without privacy and without canaries. Epsilon: the largest lower bound of all attacks, "
        "which pays for all (training that leaks no more than a Gaussian release).",
        "## Canaries with a token of their own, black box",
        _canaries([*trained, *power]),
        "The score is how much a canary's loss fell, and needs no reference. Both bounds are one-run bounds at 95 %, on the 5 % "
        "of either end, settled beforehand: *trade-off curve* assumes that the run leaks no more, at any delta, than a Gaussian "
        "release of the same epsilon, which `covered` checks against the run's own price; *guesses* assumes nothing but the "
        "coins. The sgd cells have few other records and a small step: the most that loss alone can show.",
        _over_seeds(power),
        "## Extraction",
        _extraction(trained),
        "Exposure by exact rank among all secrets of the space; a secret that was never seen has 1.44 bits on average. "
        "Completed: records of which the first 8 tokens make the model say all the rest.",
        "## Cost",
        _cost(cells),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(names: Sequence[str]) -> str:
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _epsilon(value: float | str) -> str:
    return "infinite" if math.isinf(float(value)) else f"{float(value):g}"


def _about(cell: Cell) -> list[str]:
    return [cell["setting"]["model"], _epsilon(cell["setting"]["epsilon"])]


def _membership(cells: Sequence[Cell]) -> str:
    names = list(dict.fromkeys(name for cell in cells for name in cell["attacks"]))
    heads = ["attack", *(f"{cell['setting']['model']}, epsilon {_about(cell)[1]}" for cell in cells)]
    rows = [
        _row([name, *(_attack(cell["attacks"].get(name)) for cell in cells)])
        for name in names
    ]  # fmt: skip
    best = [
        f"{max(one.get('epsilon_at_least', 0.0) for one in cell['attacks'].values()):.2f}" for cell in cells
    ]
    losses = [f"{cell['held_out_loss'][0]:.3f} -> {cell['held_out_loss'][1]:.3f}" for cell in cells]
    return "\n".join(
        [
            "AUC [interval]; TPR at 1 % FPR:\n",
            _head(heads),
            *rows,
            _row(["epsilon, at least", *best]),
            _row(["held-out loss, nats", *losses]),
        ]
    )


def _attack(one: Cell | None) -> str:
    if one is None:
        return ""
    area = one["auc"]
    told = f"{area['value']:.3f} [{area['low']:.2f}, {area['high']:.2f}]"
    return told + (f"; {100 * one['tpr_at_1_percent']['value']:.0f} %" if "tpr_at_1_percent" in one else "")


def _canaries(cells: Sequence[Cell]) -> str:
    heads = [
        "model",
        "epsilon",
        "optimizer, rate, steps",
        "seed",
        "canaries",
        "AUC",
        "TPR at 1 % FPR",
        "trade-off curve",
        "covered",
        "guesses",
        "most they show",
    ]
    rows = []
    for cell in cells:
        setting, found = cell["setting"], cell["canaries"]
        curve, guesses = found["bounds"]["trade-off curve"], found["bounds"]["guesses"]
        area, rate = found["auc"], found["tpr_at_1_percent"]
        rows.append(
            _row(
                [
                    *_about(cell), f"{setting['optimizer']}, {setting['rate']:g}, {setting['steps']}", str(setting["seed"]),
                    str(setting["num_canaries"]), f"{area['value']:.3f} [{area['low']:.2f}, {area['high']:.2f}]",
                    f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]",
                    f"**{curve['epsilon']:.2f}**", {None: "-", True: "yes", False: "no"}[found["gaussian_covers_the_run"]],
                    f"**{guesses['epsilon']:.2f}**", f"{curve['largest_possible']:.2f}, {guesses['largest_possible']:.2f}",
                ]
            )
        )  # fmt: skip
    return "\n".join([_head(heads), *rows])


def _over_seeds(cells: Sequence[Cell]) -> str:
    found = [cell for cell in cells if cell["setting"]["model"] == "stories260K"]
    if len(found) < 2:
        return ""
    told = []
    for name in ("trade-off curve", "guesses"):
        values = [cell["canaries"]["bounds"][name]["epsilon"] for cell in found]
        told.append(f"{name} {statistics.median(values):.2f} (lowest {min(values):.2f})")
    return f"stories260K at a true epsilon of 4, median over {len(found)} seeds of the sgd cells: {', '.join(told)}."


def _extraction(cells: Sequence[Cell]) -> str:
    heads = [
        "model",
        "epsilon",
        "bits",
        "exposure, never in",
        "exposure, in once",
        "exposure, in 8 times",
        "members completed",
        "non-members completed",
    ]
    rows = []
    for cell in cells:
        found = cell["exposure"]
        exposed = [", ".join(f"{x:.1f}" for x in found[times]["exposures"]) for times in ("0", "1", "8")]
        rates = [f"{100 * cell[f'completed, {name}']['value']:.1f} %" for name in ("members", "non-members")]
        rows.append(_row([*_about(cell), f"{found['0']['most']:.2f}", *exposed, *rates]))
    return "\n".join([_head(heads), *rows])


def _cost(cells: Sequence[Cell]) -> str:
    heads = ["model", "epsilon", "optimizer", "training, s", "attacks, s", "extraction, s"]
    rows = [
        _row(
            [*_about(cell), cell["setting"]["optimizer"]]
            + [f"{cell[name]:.1f}" for name in ("train_seconds", "attack_seconds", "extract_seconds")]
        )
        for cell in cells
    ]
    return "\n".join([_head(heads), *rows])
