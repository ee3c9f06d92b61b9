# SPDX-License-Identifier: Apache-2.0
"""The estimators by name, for a configuration or a command line: "huber", or with numbers, "huber:rate=0.2,mu=2".

| name | what it does | numbers |
|---|---|---|
| flat, automatic, psac | clip or normalise each example's gradient | |
| per_layer, per_block, per_adapter | each group by itself; "per_layer:automatic" by another rule | |
| schedule | flat; clip norm and noise follow a public schedule | steps, clip_end, noise_end |
| quantile | the clip norm follows a quantile of the norms, by a paid count | target, rate, share |
| slack | the same, by a count that costs nothing | target, rate |
| median | clip around a tracked centre | rate |
| huber | the same, damped inside | rate, mu |
| coordinate_median | each coordinate around a tracked centre | rate |
| geometric_median | normalised differences, several rounds on one batch | rate, nu, rounds |
| two_threshold | what is cut off is clipped again and averaged | rest, rate |
| clip21 | what is new in each record's gradient; `evaluate(..., records=)` | rate, restart |
| diff2 | differences of gradients between restarts; `evaluate` | smoothness, restart, ratio |
| dice | hidden error feedback, charged without amplification: experimental | feedback, bound |

Thresholds among the numbers (rest, mu, nu, feedback, bound) are in clip norms. To add one: its file, and a line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from clipping import CLIPPERS, Contribution, named_clipper
from clipping.clippers.robust import HuberClipper, NormalisedClipper
from dpopt.estimators.centred import Centred
from dpopt.estimators.clip21 import Clip21
from dpopt.estimators.dice import Dice
from dpopt.estimators.diff2 import Difference
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.plain import Plain
from dpopt.estimators.quantile import Quantile
from dpopt.estimators.schedule import Scheduled
from dpopt.estimators.slack import Slack
from dpopt.estimators.two_threshold import TwoThreshold
from dpopt.sampling.poisson import PoissonSampling
from dpopt.sampling.sampler import Sampling


@dataclass(frozen=True, slots=True)
class Run:
    """What an estimator may depend on: the model, the clip norm, and the public numbers of the run."""

    model: nn.Module
    clip_norm: float
    num_records: int
    sampling: Sampling


def _schedule(run: Run, *, steps: int, clip_end: float = 1.0, noise_end: float = 1.0) -> Estimator:
    return Scheduled(run.clip_norm, steps, clip_end, noise_end)


def _quantile(run: Run, *, target: float = 0.5, rate: float = 0.05, share: float = 0.01) -> Estimator:
    return Quantile(run.clip_norm, target, rate, share)


def _slack(run: Run, *, target: float = 0.5, rate: float = 0.05) -> Estimator:
    return Slack(run.clip_norm, target, rate)


def _median(run: Run, *, rate: float = 1.0) -> Estimator:
    return Centred(run.clip_norm, rate=rate, name="median")


def _huber(run: Run, *, rate: float = 1.0, mu: float = 1.0) -> Estimator:
    return Centred(run.clip_norm, partial(HuberClipper, mu=mu * run.clip_norm), rate, name="huber")


def _coordinate_median(run: Run, *, rate: float = 1.0) -> Estimator:
    size = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return Centred(run.clip_norm, rate=rate, coordinates=size, name="coordinate_median")


def _geometric_median(run: Run, *, rate: float = 1.0, nu: float = 0.5, rounds: int = 2) -> Estimator:
    rule = partial(NormalisedClipper, nu=nu * run.clip_norm)
    return Centred(run.clip_norm, rule, rate, rounds, name="geometric_median")


def _two_threshold(run: Run, *, rest: float = 2.0, rate: float = 0.1) -> Estimator:
    return TwoThreshold(run.clip_norm, rest * run.clip_norm, rate)


def _clip21(run: Run, *, rate: float = 0.1, restart: int | None = None) -> Estimator:
    if not isinstance(run.sampling, PoissonSampling):
        raise ValueError(
            f"expected Poisson sampling for clip21; got {type(run.sampling).__name__}; leave the sampler out"
        )
    return Clip21(run.clip_norm, run.num_records, run.sampling.sampling_rate, rate, restart)


def _diff2(run: Run, *, smoothness: float = 1.0, restart: int = 10, ratio: float = 3.0) -> Estimator:
    def parameters():
        return {name: p for name, p in run.model.named_parameters() if p.requires_grad}

    return Difference(run.clip_norm, parameters, smoothness, restart, ratio)


def _dice(run: Run, *, feedback: float = 0.02, bound: float | None = None) -> Estimator:
    most = None if bound is None else bound * run.clip_norm
    return Dice(run.clip_norm, feedback * run.clip_norm, most)


_BUILDERS: Mapping[str, Callable[..., Estimator]] = {
    "schedule": _schedule,
    "quantile": _quantile,
    "slack": _slack,
    "median": _median,
    "huber": _huber,
    "coordinate_median": _coordinate_median,
    "geometric_median": _geometric_median,
    "two_threshold": _two_threshold,
    "clip21": _clip21,
    "diff2": _diff2,
    "dice": _dice,
}
INDIRECT = frozenset(
    ("median", "huber", "coordinate_median", "geometric_median", "two_threshold", "clip21", "diff2")
)
"""Names of estimators whose gradient is made of several releases: its noise is not that of one."""

ESTIMATORS: tuple[str, ...] = (*CLIPPERS, *_BUILDERS)
"""Every name that `clipping=` and `--estimator` take, before a colon and numbers."""


def check_estimator(text: str) -> None:
    """Raise ValueError for what `named_estimator` cannot read."""
    _parsed(text)


def named_estimator(text: str, run: Run) -> Estimator:
    """The estimator that `text` names, "huber" or "huber:rate=0.2,mu=2"."""
    name, numbers = _parsed(text)
    if name in CLIPPERS:
        return Plain(Contribution(named_clipper(name, run.model, run.clip_norm)))
    return _BUILDERS[name](run, **numbers)


def _parsed(text: str) -> tuple[str, dict[str, float]]:
    if text in CLIPPERS:
        return text, {}
    name, colon, rest = text.partition(":")
    if name not in _BUILDERS:
        raise ValueError(
            f"expected an estimator out of {', '.join(ESTIMATORS)}; got {text!r}; flat is usual, and the README says "
            "what the others do"
        )
    known = {p.name: p for p in inspect.signature(_BUILDERS[name]).parameters.values() if p.name != "run"}
    numbers = {}
    for part in rest.split(",") if colon else ():
        key, _, value = part.strip().partition("=")
        if key not in known or key in numbers or not value:
            raise ValueError(
                f"expected {name} with numbers out of {', '.join(known)}, as in {name}:{next(iter(known))}=2; got "
                f"{part!r}; correct or leave it out"
            )
        numbers[key] = _number(key, value, whole="int" in str(known[key].annotation))
    missing = [k for k, p in known.items() if p.default is p.empty and k not in numbers]
    if missing:
        raise ValueError(f"expected {name}:{missing[0]}=...; got {text!r}; say how many")
    return name, numbers


def _number(key: str, value: str, *, whole: bool) -> float:
    try:
        return int(value) if whole else float(value)
    except ValueError as error:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"expected {kind} for {key}; got {value!r}; write {key}=2") from error
