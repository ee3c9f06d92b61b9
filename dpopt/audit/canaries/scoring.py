# SPDX-License-Identifier: Apache-2.0
"""What the releases of a run say of each canary: scores that are sums over its steps.

In step t the released vectors hold canary i at coordinates where it adds s_v if it takes part, beside noise of standard
deviation d_v, both public. The whole of what they say is u_ti = sum_v (s_v / d_v) (x_v / d_v) / a_t, with
a_t^2 = sum_v (s_v / d_v)^2: standard normal if it does not take part, larger by a_t if it does, and moved by what the
records of the data set have at that coordinate.

| score | what it is |
|---|---|
| sum | sum_t a_t u_ti / sqrt(sum_t a_t^2), over the steps that may be about it: standard normal if it is out |
| likelihood | sum_t log(1 - q + q exp(a_t u_ti - a_t^2 / 2)); in epochs, the log of the mean over their steps |
| steps | u_ti itself, of canaries that were in the batch and as many that were not |

Shapes: m canaries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpopt.audit.evidence import Evidence

MOST_PAIRS = 50_000
"""Pairs of canary and step that are kept of either kind, at most."""

Numbers = NDArray[np.float64]


@dataclass(slots=True)
class Scores:
    """The scores of `num` canaries so far. `kind` and `amount` are the sampler's law: `dpopt.audit.canaries.drawing.law_of`."""

    num: int
    kind: str
    amount: float
    sums: Numbers = field(init=False)
    likelihoods: Numbers = field(init=False)
    seen: Numbers = field(init=False)
    """The sum of a_t^2 over the steps that may be about each canary."""
    informations: list[float] = field(default_factory=list)
    pairs: list[Numbers] = field(default_factory=list)
    took_part: list[NDArray[np.bool_]] = field(default_factory=list)
    _epoch: Numbers = field(init=False)
    _place: int = 0
    _num_in: int = 0

    def __post_init__(self) -> None:
        self.sums, self.likelihoods, self.seen = np.zeros(self.num), np.zeros(self.num), np.zeros(self.num)
        self._epoch = np.full(self.num, -math.inf)

    def add(
        self, normal: Numbers, strength: float, drawn: NDArray[np.int64], here: NDArray[np.int64]
    ) -> None:
        """One step: u (m,), a, the canaries that took part, and those whose place was in the batch."""
        ratio = strength * normal - strength**2 / 2
        if self.kind == "known":  # everybody knows whose place is in the batch
            self.sums[here] += strength * normal[here]
            self.likelihoods[here] += ratio[here]
            self.seen[here] += strength**2
        else:
            self.sums += strength * normal
            self.seen += strength**2
            self._weigh(ratio)
        self.informations.append(strength**2)
        self._keep(normal, drawn)

    def _weigh(self, ratio: Numbers) -> None:
        if self.kind == "each step":
            rate = self.amount
            out = math.log1p(-rate) if rate < 1 else -math.inf
            self.likelihoods += np.logaddexp(out, math.log(rate) + ratio)
            return
        # A canary is in one of the steps of an epoch; an epoch that is cut short has the rest of its chance left.
        self._epoch = np.logaddexp(self._epoch, ratio)
        self._place += 1
        if self._place == self.amount:
            self.likelihoods += self._epoch - math.log(self.amount)
            self._epoch, self._place = np.full(self.num, -math.inf), 0

    def _keep(self, normal: Numbers, drawn: NDArray[np.int64]) -> None:
        if not len(drawn) or self._num_in >= MOST_PAIRS:
            return
        out = np.setdiff1d(np.arange(self.num), drawn)[: len(drawn)]
        chosen = np.concatenate((drawn, out))
        self._num_in += len(drawn)
        self.pairs.append(normal[chosen])
        self.took_part.append(np.arange(len(chosen)) < len(drawn))

    def evidence(
        self, included: NDArray[np.bool_], *, alone: bool, noisy: bool, rate: float | None
    ) -> tuple[Evidence, ...]:
        """The evidence: of the whole run by the sum and the likelihood, and of its steps where these are alike.

        `alone` says that nothing but the noise and its own coins moves a canary's scores, `noisy` that there is noise;
        `rate` is that of Poisson sampling, else None.
        """
        likelihoods = self.likelihoods
        if self._place:
            left = (self.amount - self._place) / self.amount
            likelihoods = likelihoods + np.logaddexp(math.log(left), self._epoch - math.log(self.amount))
        noise_std = 1.0 if alone and noisy and self.seen.min() > 0 else None
        sums = self.sums / np.sqrt(np.where(self.seen > 0, self.seen, 1.0))
        whole = Evidence(
            np.round(sums, 6), included, "dirac, sum over the steps",
            independent=alone, noise_std=noise_std,
        )  # fmt: skip
        found = [whole]
        if rate != 1.0:
            told = np.round(likelihoods, 6)
            found.append(Evidence(told, included, "dirac, likelihood ratio", independent=alone))
        alike = max(self.informations) <= min(self.informations) * (1 + 1e-9)
        if rate is not None and alike and self.pairs:
            found.append(
                Evidence(
                    np.round(np.concatenate(self.pairs), 6), np.concatenate(self.took_part), "dirac, single steps",
                    independent=alone, noise_std=noise_std,
                    num_steps=len(self.informations), sampling_rate=rate,
                )
            )  # fmt: skip
        return tuple(found)
