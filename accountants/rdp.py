# SPDX-License-Identifier: Apache-2.0
"""Renyi differential privacy of the Poisson-subsampled Gaussian: cheap, additive, valid everywhere.

With s the noise multiplier, q the sampling rate and a the order, the Renyi divergence of one step is

    rho(a) = log A(a) / (a - 1),    A(a) = E_{z ~ N(0, s^2)} [(1 - q + q exp((2z - 1) / (2 s^2)))^a],

for adding and for removing a record alike (Mironov, Talwar, Zhang 2019, arXiv:1908.10530, theorems 4 and 5).
What is computed is A(a) - 1, as a sum of positive terms, so that tiny divergences keep all their digits:

- integer a:     sum_{k >= 2} C(a, k) (1-q)^(a-k) q^k expm1(k (k-1) / (2 s^2)), in logarithms (section 3.3);
- fractional a:  E[(1+u)^a - 1 - a u], u = q (exp(y) - 1), E[u] = 0, by the trapezoidal rule. The integrand is
  analytic in a strip of half-width pi s^2 around the real line, so the error falls like
  exp(-2 pi * width / step) (Trefethen, Weideman 2014, SIAM Review 56, theorem 5.1): 1e-15 at the step used.

Zero-concentrated privacy needs no accountant of its own: rho-zCDP is the line rho(a) = rho a, the curve of a plain
Gaussian, read off here at all orders; and a Poisson-subsampled Gaussian is no better than its unsampled
Gaussian at large orders, so that the line forgets the sampling (Bun, Steinke 2016, arXiv:1605.02065).

Conversion to (epsilon, delta): Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12 (also Asoodeh
et al. 2020, arXiv:2008.06529); and total variation <= sqrt(1 - exp(-rho)) (Bretagnolle, Huber 1979).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from accountants.curve import (
    FIXED_SCHEDULE,
    Bound,
    check_count,
    check_delta,
    check_epsilon,
    rounded_up,
    spare,
)
from accountants.events import Event, Gaussian, NonPrivate, PoissonSampled
from accountants.loss import SHIFTED, Step
from accountants.relations import ADD_REMOVE, RELATIONS, Pair, priced
from accountants.shifted import shifted_log_moments
from accountants.swapped import swapped_log_moments

Array = NDArray[np.float64]

_SLACK = 1e-9  # relative; covers gammaln at order 8192 (1e-11) and the quadrature (1e-13)
_QUADRATURE_FLOOR = 0.05  # below this noise multiplier the strip is too thin: interpolate instead


def _grid() -> tuple[Array, NDArray[np.int64]]:
    near_one = 1 + np.array([0.001, 0.002, 0.003, 0.005, 0.007, *(x / 100 for x in range(1, 11))])
    tenths = 1 + np.arange(2, 100) / 10
    twentieths = np.arange(23, 60, 2) / 20
    fractional = np.concatenate([near_one, tenths[tenths % 1 != 0], twentieths])
    dense = np.round(64 * 2 ** (np.arange(0, 43) / 14)).astype(np.int64)
    sparse = np.round(512 * 2 ** (np.arange(0, 17) / 4)).astype(np.int64)
    integers = np.unique(np.concatenate([np.arange(2, 65), [128, 256], dense, sparse]))
    return np.unique(fractional.round(6)), integers


_FRACTIONAL, _INTEGER = _grid()
ORDERS: Array = np.concatenate([_FRACTIONAL, _INTEGER.astype(np.float64)])
"""The orders of every `RenyiCurve`: 1.001 to 10.9 in small steps, then integers up to 8192."""
ORDERS.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class RenyiCurve:
    """Renyi divergences `values[i]` (nats) at the fixed orders `ORDERS[i]`; addition is composition.

    Guarantees:
        - never below the truth: each value bounds the divergence from above.
        - finer than the usual orders: epsilon is at most that of Opacus' or dp_accounting's RDP accountant.
    """

    values: Array
    relation: str = ADD_REMOVE
    slip: float = 0.0

    def __add__(self, other: "RenyiCurve", /) -> "RenyiCurve":
        if not isinstance(other, RenyiCurve):
            return NotImplemented
        if self.relation != other.relation:
            raise ValueError(
                f"curves must be of one relation to be added; got {self.relation} and {other.relation}; price both anew"
            )
        return RenyiCurve(self.values + other.values, self.relation, min(1.0, self.slip + other.slip))

    def __mul__(self, count: int, /) -> "RenyiCurve":
        check_count(count)
        values = self.values * count if count else np.zeros_like(ORDERS)
        return RenyiCurve(values, self.relation, min(1.0, self.slip * count))

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 proven at `delta`, minimised over the orders."""
        check_delta(delta)
        left = spare(delta, self.slip)
        if left is None:
            return math.inf
        delta = left
        if not self.values.any():
            return 0.0
        if delta == 0 or _total_variation(self.values) <= delta:
            return math.inf if delta == 0 else 0.0
        a = ORDERS
        return rounded_up(
            max(0.0, float(np.min(self.values + np.log1p(-1 / a) - np.log(a * delta) / (a - 1))))
        )

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta proven at `epsilon`, minimised over the orders."""
        check_epsilon(epsilon)
        return min(1.0, self.slip + self._delta(epsilon))

    def _delta(self, epsilon: float) -> float:
        if not self.values.any():
            return 0.0
        if math.isinf(epsilon):
            return 0.0 if math.isfinite(float(self.values.min())) else 1.0
        a = ORDERS
        logs = (a - 1) * (self.values - epsilon + np.log1p(-1 / a)) - np.log(a)
        # exp() multiplies the absolute rounding error of its argument
        slack = 1e-12 * (1 + abs(float(np.min(logs))))
        converted = math.exp(min(0.0, float(np.min(logs)) + slack))
        return min(1.0, converted, _total_variation(self.values))

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)` with its method and assumptions."""
        return Bound(self.epsilon(delta), delta, "rdp", (RELATIONS[self.relation], FIXED_SCHEDULE))


@dataclass(frozen=True, slots=True)
class RDP:
    """The Renyi accountant: milliseconds for any schedule, 5 to 20 % above the truth as a rule."""

    name: str = "rdp"
    adaptive: bool = True
    relation: str = ADD_REMOVE

    def curve(self, event: Event) -> RenyiCurve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        pairs, slip = priced(event, self.relation)
        total = np.zeros_like(ORDERS)
        for pair, count in pairs:
            total = total + count * renyi(pair)
        return RenyiCurve(total, self.relation, slip)


def _total_variation(values: Array) -> float:
    return rounded_up(math.sqrt(-math.expm1(-float(values.min()))))


@lru_cache(maxsize=8192)
def renyi(pair: Pair) -> Array:
    """Return the Renyi divergences of one `pair` at `ORDERS`, rounded up; read-only."""
    match pair:
        case NonPrivate() | Gaussian(noise_multiplier=0):
            values = np.full_like(ORDERS, np.inf)
        case Gaussian(noise_multiplier=s):
            with np.errstate(over="ignore"):
                values = ORDERS / (2 * s) / s * (1 + _SLACK)
        case PoissonSampled(sampling_rate=q, event=Gaussian(noise_multiplier=s)):
            with np.errstate(over="ignore", under="ignore"):
                values = _sampled(s, q) * (1 + _SLACK) / (ORDERS - 1)
        case Step(pair=kind) if kind == SHIFTED:
            values = shifted_log_moments(pair, ORDERS) * (1 + _SLACK) / (ORDERS - 1)
        case Step():
            values = _swapped(pair) * (1 + _SLACK) / (ORDERS - 1)
        case _:
            raise AssertionError(f"priced() returned {pair!r}")
    values.flags.writeable = False
    return values


def _swapped(step: Step) -> Array:
    """Compute log A at every order for a record replaced; where that is too dear, bound it.

    Its half above 0 is that of the pair (1-q) N(0) + q N(2) against N(0), the other one that of the reverse at
    most: A - 1 is at most twice that of the sampled Gaussian at half the noise; and sampling only mixes.
    """
    s = step.noise_multiplier / 2
    with np.errstate(over="ignore", under="ignore"):
        exact = _logs1p(swapped_log_moments(step, ORDERS))
        sampled = _sampled(s, step.sampling_rate)
        excess = sampled + np.log(-np.expm1(-np.maximum(sampled, 1e-300)))
        plain = ORDERS * (ORDERS - 1) / (2 * s) / s
    return np.minimum(np.minimum(exact, _logs1p(math.log(2) + excess)), plain)


def _sampled(s: float, q: float) -> Array:
    """Compute log A at every order."""
    integers = _logs1p(_integer_logs(s, q))
    if s < _QUADRATURE_FLOOR:
        # log A is convex in the order and log A(1) = 0, so the chord between integers lies above it.
        knots = np.concatenate([[1.0], _INTEGER.astype(np.float64)])
        fractional = np.interp(_FRACTIONAL, knots, np.concatenate([[0.0], integers]))
    else:
        fractional = _logs1p(np.array([_fractional_log(s, q, a) for a in _FRACTIONAL]))
    return np.concatenate([fractional, integers])


def _logs1p(logs: Array) -> Array:
    """Compute log(1 + exp(logs)), keeping the digits of both ends."""
    return np.logaddexp(0.0, logs)


@lru_cache(maxsize=1)
def _terms() -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """Lay every (a, k) with 2 <= k <= a end to end: a, k, log C(a, k), and where each order starts."""
    a = np.concatenate([np.full(n - 1, n, dtype=np.float64) for n in _INTEGER])
    k = np.concatenate([np.arange(2, n + 1, dtype=np.float64) for n in _INTEGER])
    log_binomial = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
    starts = np.concatenate([[0], np.cumsum(_INTEGER - 1)[:-1]])
    return a, k, log_binomial, starts


def _integer_logs(s: float, q: float) -> Array:
    """Compute log(A(a) - 1) at the integer orders."""
    a, k, log_binomial, starts = _terms()
    exponent = k * (k - 1) / 2 / s / s
    # log(expm1(x)) without overflow
    growth = np.where(exponent > 30, exponent, np.log(np.expm1(np.minimum(exponent, 30.0))))
    logs = log_binomial + k * math.log(q) + (a - k) * math.log1p(-q) + growth
    peaks = np.maximum.reduceat(logs, starts)
    finite = np.where(np.isfinite(peaks), peaks, 0.0)
    scaled = np.exp(logs - np.repeat(finite, _INTEGER - 1))
    return finite + np.log(np.add.reduceat(scaled, starts))


def _fractional_log(s: float, q: float, a: float) -> float:
    """Compute log(A(a) - 1) at one fractional order, by the trapezoidal rule in x = z / s."""
    step = 2 * math.pi * min(math.pi * s, 6.0) / 40
    x = np.arange(-13.0, a / s + 13.0, min(step, 0.25))
    y = x / s - 1 / (2 * s * s)
    logs = _log_excess(y, q, a) - x * x / 2
    return float(np.logaddexp.reduce(logs)) + math.log(x[1] - x[0]) - math.log(2 * math.pi) / 2


def _log_excess(y: Array, q: float, a: float) -> Array:
    """Compute log((1+u)^a - 1 - a u) with u = q (exp(y) - 1): without cancellation near 0, without overflow."""
    u = q * np.expm1(np.minimum(y, 600.0))
    log_u = math.log(q) + y + np.log1p(-np.exp(-np.maximum(y, 1.0)))  # used where y is large only
    power = a * np.where(y > 1, np.logaddexp(0.0, log_u), np.log1p(u))
    tangent = np.logaddexp(0.0, math.log(a) + log_u)
    large = power + np.log(-np.expm1(np.minimum(tangent - power, -1e-300)))
    direct = np.log(np.maximum(np.expm1(np.minimum(power, 50.0)) - a * np.minimum(u, 1e100), 1e-300))
    v = np.clip(u, -1e-2, 1e-2)
    series = np.ones_like(v)
    for j in range(9, 2, -1):
        series = 1 + (a - j + 1) / j * v * series
    small = math.log(a * (a - 1) / 2) + 2 * np.log(np.maximum(np.abs(v), 1e-300)) + np.log(series)
    return np.where(np.abs(u) < 1e-2, small, np.where(power > 20, large, direct))
