# SPDX-License-Identifier: Apache-2.0
"""Which records take part: at the rate that is priced, and by the law that is priced, which the mean alone cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from dpopt.audit.step_checks.case import TrainingStep, running, seeded
from dpopt.audit.step_checks.findings import CAUTION, FAULT, HOLDS, LEVEL, UNCHECKED, Finding, statistical


class Watched(Sequence[Any]):
    """A dataset that notes which of its records are looked at."""

    def __init__(self, records: Sequence[Any]) -> None:
        self._records = list(records)
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self.seen.append(int(index) % len(self))
        return self._records[index]


def inclusions(case: TrainingStep, steps: int, seed: int) -> np.ndarray | None:
    """How often each record takes part in each of `steps` steps: (steps, records); None without a loader."""
    records = Watched(case.records)
    rows: list[np.ndarray] = []
    with seeded(seed), running(case.make(records, case.noise_multiplier)) as run:
        if run.batches is None:
            return None
        while len(rows) < steps:
            before = len(rows)
            for _ in _epoch(run.batches, records):
                rows.append(np.bincount(records.seen, minlength=len(records)))
                records.seen = []
                if len(rows) == steps:
                    break
            if len(rows) == before:
                break
    return np.stack(rows) if rows else None


def _epoch(batches: Any, records: Watched) -> Iterator[None]:
    iterator = iter(batches)
    while True:
        records.seen = []
        try:
            next(iterator)
        except StopIteration:
            return
        yield


def check_sampler(case: TrainingStep, seed: int, steps: int = 400) -> list[Finding]:
    """The rate, the size of the batches, the spread over records, and independence of steps and of records."""
    expected = f"{case.sampler} batches at rate {case.sampling_rate}"
    if case.sampling_rate is None:
        return [Finding("sampler", UNCHECKED, "the sampler that is priced", "no sampling_rate given")]
    drawn = inclusions(case, steps, seed)
    if drawn is None or len(drawn) < 20:
        return [
            Finding("sampler", UNCHECKED, expected, "make returns no loader, or one of fewer than 20 batches")
        ]
    again = f"inclusions(step, {len(drawn)}, {seed})"
    if case.sampler == "shuffled":
        return [_each_once(drawn, case.sampling_rate, again)]
    law = _poisson if case.sampler == "poisson" else _fixed_size
    return [_rate(drawn, case.sampling_rate, again), *law(drawn, case.sampling_rate, again)]


def _finding(check: str, expected: str, seen: str, figure: float, odd: bool, again: str) -> Finding:
    verdict = FAULT if odd else HOLDS
    return Finding(check, verdict, expected, seen, figure, statistical(), again if odd else "")


def _rate(drawn: np.ndarray, rate: float, again: str) -> Finding:
    total, count = int(drawn.sum()), drawn.size
    low, high = (
        float(f) for f in (stats.binom.cdf(total, count, rate), stats.binom.sf(total - 1, count, rate))
    )
    seen = f"{total / count:.5g}, {total / count / rate:.4g} times that"
    expected = f"each record at rate {rate:.5g}"
    if high < LEVEL / 2:
        return _finding("sampling rate", expected, seen, total / count / rate, True, again)
    if low < LEVEL / 2:
        never = int((drawn.sum(0) == 0).sum())
        seen += f"; {never} records never" if never else ""
        return Finding(
            "sampling rate",
            CAUTION,
            expected,
            seen + ": less than is paid for",
            total / count / rate,
            statistical(),
        )
    return _finding("sampling rate", expected, seen, total / count / rate, False, again)


def _dispersion(check: str, energy: float, freedom: int, what: str, again: str, expected: str) -> Finding:
    """Of a sum of squares that is chi-square with `freedom` by the law that is priced."""
    low, high = stats.chi2.cdf(energy, freedom), stats.chi2.sf(energy, freedom)
    # The binomial is not normal: its own fourth moment makes this a little wider than chi-square.
    odd = min(low, high) < LEVEL / 20
    return _finding(
        check,
        expected,
        f"{energy / freedom:.4f} times the variance {what}",
        energy / freedom,
        bool(odd),
        again,
    )


def _poisson(drawn: np.ndarray, rate: float, again: str) -> list[Finding]:
    steps, records = drawn.shape
    variance = rate * (1 - rate)
    found = [_twice(drawn, again)]
    if not variance:
        return found
    sizes, counts = drawn.sum(1), drawn.sum(0)
    by_size = float(np.square(sizes - records * rate).sum() / (records * variance))
    by_record = float(np.square(counts - steps * rate).sum() / (steps * variance))
    found.append(_dispersion("batch sizes", by_size, steps, "of Poisson batches", again,
                             "sizes that vary as Poisson draws do (0: batches of one size)"))  # fmt: skip
    found.append(_dispersion("records", by_record, records, "of Poisson draws between records", again,
                             "counts that vary between records as coins do (0: an epoch takes each once)"))  # fmt: skip
    found.append(_correlations(drawn, rate, variance, again))
    return found


def _twice(drawn: np.ndarray, again: str) -> Finding:
    most = int(drawn.max())
    return Finding("once per step", FAULT if most > 1 else HOLDS, "each record at most once in a step",
                   f"at most {most} times", float(most), "exact", again if most > 1 else "")  # fmt: skip


def _correlations(drawn: np.ndarray, rate: float, variance: float, again: str) -> Finding:
    """Between steps (lags 1 to 20) and between neighbouring records."""
    centred = (drawn - rate) / math.sqrt(variance)
    worst, where, tests = 0.0, "", 0
    for lag in range(1, min(21, len(centred) // 2)):
        z = float((centred[lag:] * centred[:-lag]).sum() / math.sqrt(centred[lag:].size))
        worst, where, tests = (
            *max((worst, where), (z, f"steps {lag} apart"), key=lambda p: abs(p[0])),
            tests + 1,
        )
    for lag in range(1, min(5, centred.shape[1])):
        z = float((centred[:, lag:] * centred[:, :-lag]).sum() / math.sqrt(centred[:, lag:].size))
        worst, where, tests = (
            *max((worst, where), (z, f"records {lag} apart"), key=lambda p: abs(p[0])),
            tests + 1,
        )
    limit = float(stats.norm.isf(LEVEL / 4 / tests)) * 1.05
    return _finding("draws independent", "steps and records that are drawn independently",
                    f"{worst:+.1f} standard deviations at {where}, at most {limit:.1f} by chance", abs(worst) / limit,
                    abs(worst) > limit, again)  # fmt: skip


def _fixed_size(drawn: np.ndarray, rate: float, again: str) -> list[Finding]:
    steps, records = drawn.shape
    sizes, counts = drawn.sum(1), drawn.sum(0)
    wanted = round(rate * records)
    same = bool((sizes == wanted).all())
    variance = rate * (1 - rate)
    found = [_twice(drawn, again), _finding("batch sizes", f"batches of exactly {wanted}", f"{sizes.min()} to {sizes.max()}",
                                           float(sizes.max()) / wanted, not same, again)]  # fmt: skip
    if variance and records > 1:
        # Hypergeometric draws: records of one step are negatively correlated, so the sum of squares has records - 1 freedoms.
        energy = float(np.square(counts - steps * rate).sum() / (steps * variance) * (records - 1) / records)
        found.append(_dispersion("records", energy, records - 1, "of independent draws between records", again,
                                 "counts that vary as independent draws do"))  # fmt: skip
    return found


def _each_once(drawn: np.ndarray, rate: float, again: str) -> Finding:
    length = round(1 / rate)
    epochs = [drawn[k : k + length].sum(0) for k in range(0, len(drawn) - length + 1, length)]
    odd = [e for e in epochs if int(e.max()) > 1]
    missed = sum(int((e == 0).sum()) for e in epochs)
    seen = f"{len(odd)} of {len(epochs)} epochs take a record twice, {missed} records left out of one"
    return _finding(
        "sampler", f"each record at most once in {length} steps", seen, float(len(odd)), bool(odd), again
    )
