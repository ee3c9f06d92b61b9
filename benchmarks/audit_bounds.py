# SPDX-License-Identifier: Apache-2.0
"""What each lower bound shows of simulated canaries, and how often it lies above the truth.

`python -m benchmarks.audit_bounds`: scores are drawn from the laws that the white-box canaries of a run have, so that
thousands of audits cost seconds. `benchmarks.audit_power` measures the same through whole training runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.report import command_line, default_path, described, surroundings, table, write
from dpopt import noise_multiplier
from dpopt.audit import (
    GAUSSIAN,
    Evidence,
    any_mechanism,
    clopper_pearson,
    fdp_one_run,
    full_signal,
    gdp_scores,
    gdp_threshold,
    order_statistics,
    per_step,
    poisson_steps,
    steinke,
)
from dpopt.audit.bounds.lower_bound import LowerBound, num_right
from dpopt.audit.bounds.one_run import fdp_refuted, num_guesses, steinke_p_value

DELTA = 1e-5
Bound = Callable[[Evidence, float], LowerBound]
GAUSSIAN_BOUNDS: Mapping[str, Bound] = {
    "full_signal": full_signal,
    "gdp_scores": gdp_scores,
    "order_statistics": order_statistics,
    "gdp_threshold": gdp_threshold,
    "fdp_one_run": fdp_one_run,
    "steinke": steinke,
    "clopper_pearson": clopper_pearson,
    "order_statistics, any mechanism": partial(order_statistics, family=any_mechanism(DELTA)),
}


@dataclass(frozen=True, slots=True)
class Steps:
    """A run of Gaussian steps on Poisson samples, calibrated to epsilon."""

    epsilon: float
    rate: float
    count: int

    @property
    def noise(self) -> float:
        """Its noise multiplier."""
        return noise_multiplier(epsilon=self.epsilon, delta=DELTA, sampling_rate=self.rate, steps=self.count)


def mu_of(epsilon: float) -> float:
    """The Gaussian release of this epsilon."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if GAUSSIAN.epsilon(middle, DELTA) < epsilon else (low, middle)
    return low


def gaussian(rng: np.random.Generator, m: int, mu: float) -> Evidence:
    """Canaries with a coordinate each, in a run of full batches."""
    included = rng.random(m) < 0.5
    return Evidence(
        rng.standard_normal(m) + mu * included, included, "dirac", independent=True, noise_std=1.0
    )


def sampled(
    rng: np.random.Generator, m: int, steps: Steps, noise: float
) -> tuple[Evidence, Evidence, Evidence]:
    """Canaries in a run of sampled steps: summed, by the likelihood ratio, and step by step."""
    included = rng.random(m) < 0.5
    sums, ratios = np.zeros(m), np.zeros(m)
    pairs: list[np.ndarray] = []
    took_part: list[np.ndarray] = []
    for _ in range(steps.count):
        drawn = included & (rng.random(m) < steps.rate)
        seen = rng.standard_normal(m) + drawn / noise
        sums += seen
        ratios += np.log1p(steps.rate * np.expm1(seen / noise - 0.5 / noise**2))
        out = np.flatnonzero(~drawn)[: int(drawn.sum())]
        chosen = np.concatenate((np.flatnonzero(drawn), out))
        pairs.append(seen[chosen])
        took_part.append(drawn[chosen])
    single = Evidence(
        np.concatenate(pairs), np.concatenate(took_part), "steps", True, None, steps.count, steps.rate
    )
    return (
        Evidence(sums / np.sqrt(steps.count), included, "sum", independent=True, noise_std=1.0),
        Evidence(ratios, included, "likelihood ratio", independent=True),
        single,
    )


def spread(values: Sequence[float]) -> str:
    """median [5 %, 95 %]."""
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def power(rng: np.random.Generator, draws: int) -> tuple[list[list[str]], list[list[str]]]:
    """What is shown of full batches, and of sampled steps."""
    whole = []
    for epsilon in (1.0, 4.0, 8.0):
        for m in (100, 1000, 5000):
            seen = [gaussian(rng, m, mu_of(epsilon)) for _ in range(draws)]
            cells = [
                spread([bound(one, DELTA).epsilon for one in seen]) for bound in GAUSSIAN_BOUNDS.values()
            ]
            whole.append([f"{epsilon:g}", str(m), *cells])
    parts = []
    for steps in (Steps(4.0, 0.01, 1000), Steps(4.0, 0.1, 200), Steps(4.0, 0.5, 100)):
        for m in (1000, 5000):
            parts.append(of_steps(rng, steps, m, max(1, draws // 5)))
    return whole, parts


def of_steps(rng: np.random.Generator, steps: Steps, m: int, draws: int) -> list[str]:
    """One row of the table of sampled steps."""
    own = poisson_steps(steps.rate, steps.count)
    found: dict[str, list[float]] = {
        name: [] for name in ("steps", "own", "gaussian", "sum", "curve", "guesses")
    }
    for _ in range(draws):
        summed, ratio, single = sampled(rng, m, steps, steps.noise)
        found["steps"].append(per_step(single, DELTA).epsilon)
        found["own"].append(order_statistics(ratio, DELTA, family=own).epsilon)
        found["gaussian"].append(order_statistics(ratio, DELTA).epsilon)
        found["sum"].append(full_signal(summed, DELTA).epsilon)
        found["curve"].append(fdp_one_run(ratio, DELTA).epsilon)
        found["guesses"].append(steinke(ratio, DELTA).epsilon)
    return [f"{steps.rate:g}, {steps.count}", str(m), *(spread(values) for values in found.values())]


def alarms(rng: np.random.Generator, draws: int) -> list[list[str]]:
    """How often each bound lies above the truth, in percent."""
    rows = []
    for epsilon in (0.0, 1.0, 4.0):
        mu = mu_of(epsilon) if epsilon else 0.0
        seen = [gaussian(rng, 1000, mu) for _ in range(draws)]
        for name, bound in GAUSSIAN_BOUNDS.items():
            if name in ("steinke", "fdp_one_run"):
                share = _refuted(seen, name, epsilon, mu)
            else:
                share = np.mean([bound(one, DELTA).epsilon > epsilon for one in seen])
            rows.append([name, f"{epsilon:g}", f"{100 * share:.1f} %"])
    steps = Steps(4.0, 0.1, 50)
    runs = [sampled(rng, 400, steps, steps.noise) for _ in range(draws // 2)]
    true = GAUSSIAN.epsilon(1 / steps.noise, DELTA)
    own = poisson_steps(steps.rate, steps.count)
    single = [Evidence(run[2].scores, run[2].included, "steps", True) for run in runs]
    shares = {
        "full_signal, sums of sampled steps": [full_signal(run[0], DELTA).epsilon > 4.0 for run in runs],
        "order_statistics, likelihood ratios of sampled steps": [
            order_statistics(run[1], DELTA, family=own).epsilon > 4.0 for run in runs
        ],
        "per_step (its mu)": [gdp_scores(one, DELTA).epsilon > true for one in single],
    }
    return rows + [[name, "4", f"{100 * np.mean(share):.1f} %"] for name, share in shares.items()]


def _refuted(seen: Sequence[Evidence], name: str, epsilon: float, mu: float) -> float:
    k = num_guesses(1000, 0.05)
    right = [num_right(one, k, k) for one in seen]
    if name == "steinke":
        return float(np.mean([steinke_p_value(1000, 2 * k, v, epsilon, DELTA) <= 0.05 for v in right]))
    return float(np.mean([fdp_refuted(1000, 2 * k, v, mu, 0.05) for v in right]))


def main() -> None:
    """Read the command line, draw, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_bounds", description=__doc__)
    parser.add_argument(
        "--draws", type=int, default=100, help="of each setting; the false alarms take 20 times as many"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/audit-bounds_<processor>_<date>.md"
    )
    settings = parser.parse_args()
    rng, started = np.random.default_rng(settings.seed), time.process_time()
    whole, parts = power(rng, settings.draws)
    false = alarms(rng, 20 * settings.draws)
    command = command_line("benchmarks.audit_bounds", sys.argv[1:])
    seconds = time.process_time() - started
    around = surroundings()
    lines = [
        "# What lower bounds on epsilon show of simulated canaries", "",
        f"`{command}` ({seconds:.0f} s of process time). Delta 1e-5, 95 % confidence for each bound by itself, share of "
        "guesses 5 % at either end; median [5 %, 95 %] of the draws.", "",
        "## Full batches: scores are Gaussian", "",
        table(["true epsilon", "m", *GAUSSIAN_BOUNDS], whole), "",
        "## Sampled steps calibrated to epsilon 4", "",
        table(
            ["rate, steps", "m", "per_step", "order_statistics, recorded steps", "order_statistics, Gaussian curve",
             "full_signal, sums", "fdp_one_run", "steinke"], parts,
        ), "",
        "## How often a bound lies above the truth (nominal 5 %)", "",
        table(["bound", "true epsilon", "above"], false), "", described(around), "",
    ]  # fmt: skip
    figures: dict[str, object] = {"full": whole, "sampled": parts, "above": false, "command": command}
    write(settings.out or default_path("audit-bounds"), "\n".join(lines), figures | {"surroundings": around})


if __name__ == "__main__":
    main()
