# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuned language model gives away, without privacy and with: `python -m benchmarks.audit_attacks`.

Each model is fine-tuned on descriptions (E2E) of which a fair coin chose half, with canaries of two kinds among them:
canaries that end in a token of their own, each in by its own coin, and secrets of digits or letters, put in a stated
number of times. Then it is attacked: membership of the descriptions, lower bounds on epsilon, exposure, completion.

Each finished cell is a file in `--kept`: the same command goes on where it was interrupted. Seeded, hence for
benchmarks only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from accountants import Gaussian, PoissonSampled, Repeated, accountant
from benchmarks.audit_attacks_problem import TIMES, Problem, Setting, problem
from benchmarks.report import command_line, default_path, described, surroundings, write
from dpopt import noise_multiplier
from dpopt.atomic_files import write_file
from dpopt.attacks.battery import Signals, run_attacks
from dpopt.attacks.canaries import bits
from dpopt.attacks.curves import auc, tpr_at_fpr
from dpopt.attacks.extraction import complete, exposures, rate
from dpopt.attacks.language_signals import sequence_losses, token_signals
from dpopt.attacks.shadow import ShadowPlan, finished, record_digest, train_shadows
from dpopt.attacks.shadow_training import Recipe, train_language_model
from dpopt.audit import GAUSSIAN, Evidence, fdp_one_run, steinke
from dpopt.audit.bounds.families import gaussian_covers
from dpopt.finetune.language_model import load, save

DELTA = 1e-5


def recipe_of(setting: Setting, num_records: int) -> Recipe:
    """How the cell is trained."""
    private = math.isfinite(setting.epsilon)
    noise = noise_multiplier(
        epsilon=setting.epsilon, delta=DELTA, sampling_rate=setting.rate, steps=setting.steps
    ) if private else 0.0  # fmt: skip
    return Recipe(
        "", setting.steps, round(setting.rate * num_records), setting.learning_rate, 1.0 if private else None, noise,
        128, setting.max_tokens, setting.optimizer,
    )  # fmt: skip


def cell(setting: Setting, models: dict[str, Path], data: Path, shadows: Path | None) -> dict[str, Any]:
    """Train and attack; plain numbers."""
    made = problem(setting, models, data)
    base = problem(setting, models, data).model.eval()
    train = made.train
    recipe = recipe_of(setting, len(train))
    started = time.process_time()
    before = sequence_losses(base, made.canaries)
    model = train_language_model(recipe, train, setting.seed, model=made.model)
    trained = time.process_time()
    held_out = [one for one, inside in zip(made.tokens, made.member, strict=True) if not inside]
    found: dict[str, Any] = {
        "setting": asdict(setting),
        "noise_multiplier": recipe.noise_multiplier,
        "records": len(train),
        "train_seconds": trained - started,
        "held_out_loss": [float(sequence_losses(one, held_out).mean()) for one in (base, model)],
        "canaries": canary_figures(
            before - sequence_losses(model, made.canaries), made.included, setting, recipe
        ),
    }
    attacked = time.process_time()
    found["attacks"] = attack_figures(base, model, made, setting, shadows)
    extracted = time.process_time()
    found["attack_seconds"] = extracted - attacked
    found["exposure"] = exposure_figures(model, made)
    members = [one for one, inside in zip(made.tokens, made.member, strict=True) if inside]
    for name, records in (("members", members), ("non-members", held_out)):
        found[f"completed, {name}"] = rate(complete(model, records).extracted(8))._asdict()
    found["extract_seconds"] = time.process_time() - extracted
    return found


def canary_figures(
    scores: np.ndarray, included: np.ndarray, setting: Setting, recipe: Recipe
) -> dict[str, Any]:
    """What the losses of the new-token canaries show of epsilon; the bound is f-DP's, settled beforehand."""
    evidence = Evidence(scores, included, "new tokens, loss")
    bounds = {
        "trade-off curve": fdp_one_run(evidence, DELTA, family=GAUSSIAN),
        "guesses": steinke(evidence, DELTA),
    }
    covered = None
    if recipe.noise_multiplier:
        event = Repeated(PoissonSampled(setting.rate, Gaussian(recipe.noise_multiplier)), setting.steps)
        covered = gaussian_covers(accountant("pld").curve(event), setting.epsilon, DELTA, len(scores))
    return {
        "auc": auc(scores, included)._asdict(),
        "tpr_at_1_percent": tpr_at_fpr(scores, included, 0.01)._asdict(),
        "bounds": {name: asdict(replace(one, assumptions=())) for name, one in bounds.items()},
        "gaussian_covers_the_run": covered,
    }


def attack_figures(
    base: nn.Module, model: nn.Module, made: Problem, setting: Setting, shadows: Path | None
) -> dict[str, Any]:
    """Every attack on the descriptions."""
    signals = token_signals(model, made.tokens, references=[base])
    losses = included = None
    if shadows is not None:
        folders = finished(shadows)
        losses = np.stack(
            [
                sequence_losses(load(str(folder))[0], made.tokens, cache=shadows / "signals")
                for folder in folders
            ]
        )
        plan = shadow_plan(made, setting)
        included = plan.included(len(folders))
    report = run_attacks(
        Signals(signals.losses, signals, signals.reference_losses[None], losses, included),
        made.member, delta=DELTA, gaussian=True,
        controls={"loss under the base": -signals.reference_losses},
    )  # fmt: skip
    figures = {
        name: {
            "auc": one.auc._asdict(),
            "tpr_at_1_percent": one.tpr[0.01]._asdict(),
            "epsilon_at_least": one.bound.epsilon,
        }
        for name, one in report.attacks.items()
    }
    return figures | {"control: loss under the base": {"auc": next(iter(report.controls.values()))._asdict()}}


def exposure_figures(model: nn.Module, made: Problem) -> dict[str, Any]:
    """Exposure by how often a secret was put in."""
    found = exposures(model, made.tokenizer, made.secrets)
    return {
        str(times): {
            "exposures": [round(one.exposure, 2) for one in found if one.canary.times == times],
            "ranks": [one.rank for one in found if one.canary.times == times],
            "most": bits(found[0].canary.format),
        }
        for times in sorted(set(TIMES))
    }


def shadow_plan(made: Problem, setting: Setting) -> ShadowPlan:
    """Shadow models of a cell's descriptions, trained without privacy and without canaries."""
    about = {"steps": setting.steps, "rate": setting.rate, "learning_rate": setting.learning_rate}
    return ShadowPlan(tuple(record_digest(one) for one in made.pool), setting.seed, about)


def train_shadow_models(
    setting: Setting, number: int, models: dict[str, Path], data: Path, folder: Path
) -> None:
    """As far as the folder does not hold them."""
    made = problem(setting, models, data)
    recipe = recipe_of(replace(setting, epsilon=math.inf), len(made.pool) // 2)

    def train(places: np.ndarray, seed: int) -> nn.Module:
        base = load(str(models[setting.model]))[0]
        return train_language_model(recipe, [made.tokens[i] for i in places], seed, model=base)

    train_shadows(
        folder, shadow_plan(made, setting), number, train, lambda one, path: save(one, made.tokenizer, path)
    )


def settings(names: Sequence[str], seeds: Sequence[int]) -> list[Setting]:
    """The cells: realistic training at four budgets, and one that gives the canaries all the power there is."""
    cells = [Setting(name, epsilon) for name in names for epsilon in (math.inf, 8.0, 4.0, 1.0)]
    power = [
        Setting(name, 4.0, 0.5, 30, 0.01, "sgd", num_pool=40, num_canaries=1000, seed=seed)
        for name in names
        for seed in seeds
    ]
    return cells + power


def main(words: list[str] | None = None) -> None:
    """Make the cells that are missing, and the report."""
    from benchmarks.audit_attacks_report import markdown

    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_attacks", description=__doc__)
    parser.add_argument(
        "--models", type=Path, nargs="+", required=True, help="folders of causal language models"
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds e2e_nlg")
    parser.add_argument(
        "--kept", type=Path, required=True, help="the folder of finished cells and shadow models"
    )
    parser.add_argument("--shadows", type=int, default=4, help="shadow models of each model; 0: none")
    parser.add_argument("--shadows-for", nargs="*", help="models that get shadow models; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the cells about power")
    parser.add_argument("--only", help="make only cells whose name holds this, and no report")
    parser.add_argument("--report-only", action="store_true", help="report the finished cells, make none")
    parser.add_argument("--out", type=Path, help="default: audit-attacks_<processor>_<date>.md")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    models = {("embedded" if path.name == "model" else path.name): path for path in options.models}
    options.kept.mkdir(parents=True, exist_ok=True)
    cells = [
        one for one in settings(list(models), options.seeds) if not options.only or options.only in one.name
    ]
    if options.report_only:
        cells = [one for one in cells if (options.kept / f"{one.name}.json").exists()]
    if options.shadows and options.only == "shadows":
        for name in options.shadows_for or models:
            train_shadow_models(
                Setting(name, math.inf),
                options.shadows,
                models,
                options.data,
                options.kept / f"shadows-{name}",
            )
        return
    with Progress() as progress:
        line = progress.add_task("cells", total=len(cells))
        for setting in cells:
            path = options.kept / f"{setting.name}.json"
            if not path.exists():
                shadows = None
                wanted = setting.model in (options.shadows_for or models)
                if options.shadows and wanted and setting.optimizer == "adamw":
                    shadows = options.kept / f"shadows-{setting.model}"
                    train_shadow_models(setting, options.shadows, models, options.data, shadows)
                found = cell(setting, models, options.data, shadows)
                write_file(path, json.dumps(found, indent=1).encode())
            progress.advance(line)
    if options.only:
        return
    figures = [json.loads((options.kept / f"{one.name}.json").read_text()) for one in cells]
    around = surroundings() | {"threads": 1}
    words = [word for word in sys.argv[1:] if word != "--report-only"]
    command = command_line("benchmarks.audit_attacks", words)
    text = markdown(figures, described(around), command)
    write(
        options.out or default_path("audit-attacks"),
        text,
        {"command": command, "surroundings": around, "cells": figures},
    )


if __name__ == "__main__":
    main()
