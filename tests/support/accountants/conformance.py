# SPDX-License-Identifier: Apache-2.0
"""What every accountant must satisfy. A new one is one subclass with a `rule` and a tolerance."""

import math
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from accountants import (
    Accountant,
    Composed,
    Curve,
    Gaussian,
    NonPrivate,
    PoissonSampled,
    Repeated,
    UnpricedEvent,
)
from tests.support.accountants.reference import DIGITS, ROWS

# One test function serves several classes, hence the suppressed health check; nothing is stored, nothing shrunk.
QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.differing_executors],
)
sigmas = st.floats(0.6, 8)
rates = st.sampled_from([0.01, 0.1, 0.5, 1.0])
counts = st.integers(1, 300)
deltas = st.sampled_from([1e-3, 1e-5, 1e-7])


class AccountantConformance:
    rule: ClassVar[Accountant]
    slack: ClassVar[tuple[float, float]] = (1e-9, 0.0)  # relative, absolute: how far from monotone it may be

    def price(self, event, delta=1e-5):
        return self.rule.curve(event).epsilon(delta)

    def test_protocols(self):
        assert isinstance(self.rule, Accountant)
        assert isinstance(self.rule.curve(Gaussian(1.0)), Curve)

    @pytest.mark.parametrize("number", range(1, 21))
    def test_never_below_the_truth(self, number):
        row = ROWS[number - 1]
        assert self.price(row.event, row.delta) >= row.tight * (1 - DIGITS)

    @QUICK
    @given(sigmas, rates, counts, deltas)
    def test_monotone_in_steps_noise_rate_delta(self, sigma, q, n, delta):
        def price(sigma, q, n, delta):
            return self.price(Repeated(PoissonSampled(q, Gaussian(sigma)), n), delta)

        here = price(sigma, q, n, delta) * (1 - self.slack[0]) - self.slack[1]
        assert price(sigma, q, n + 1 + n // 2, delta) >= here
        assert price(sigma / 1.3, q, n, delta) >= here
        assert price(sigma, min(1.0, q * 1.3), n, delta) >= here
        assert price(sigma, q, n, delta / 10) >= here

    @QUICK
    @given(st.lists(st.tuples(sigmas, rates, st.integers(1, 40)), min_size=2, max_size=3), st.randoms())
    def test_order_of_composition_irrelevant(self, leaves, random):
        parts = [Repeated(PoissonSampled(q, Gaussian(s)), n) for s, q, n in leaves]
        whole = self.price(Composed(tuple(parts)))
        random.shuffle(parts)
        assert self.price(Composed(tuple(parts))) == pytest.approx(whole, rel=1e-12)
        total = self.rule.curve(Composed(()))
        for part in parts:
            total = total + self.rule.curve(part)
        assert total.epsilon(1e-5) == pytest.approx(whole, rel=1e-12)

    def test_repetition_is_multiplication(self):
        step = PoissonSampled(0.02, Gaussian(1.2))
        curve = self.rule.curve(step)
        assert (curve * 50).epsilon(1e-5) == pytest.approx(self.price(Repeated(step, 50)), rel=1e-12)
        assert (curve * 30 + curve * 20).epsilon(1e-5) == pytest.approx((curve * 50).epsilon(1e-5), rel=1e-12)

    def test_nothing_costs_nothing(self):
        for event in (Composed(()), Repeated(NonPrivate(), 0), PoissonSampled(0.0, Gaussian(1.0))):
            assert self.price(event) == 0
            assert self.rule.curve(event).epsilon(0.0) == 0
            assert self.rule.curve(event).delta(0.0) == 0
        assert (self.rule.curve(Gaussian(0.0)) * 0).epsilon(1e-5) == 0

    @pytest.mark.parametrize("event", [NonPrivate(), Gaussian(0.0), PoissonSampled(0.01, Gaussian(0.0))])
    def test_no_privacy_is_infinite(self, event):
        curve = self.rule.curve(Composed((Gaussian(1.0), event)))
        assert math.isinf(curve.epsilon(1e-5))
        assert curve.delta(10.0) == 1.0

    def test_delta_zero_is_infinite(self):
        assert math.isinf(self.rule.curve(Gaussian(1.0)).epsilon(0.0))
        assert math.isinf(self.rule.curve(Repeated(PoissonSampled(0.1, Gaussian(1.0)), 2)).epsilon(0.0))

    @pytest.mark.parametrize("event", [ROWS[0].event, ROWS[8].event, ROWS[7].event, Gaussian(30.0)])
    def test_delta_inverts_epsilon(self, event):
        curve = self.rule.curve(event)
        epsilon = curve.epsilon(1e-5)
        assert curve.delta(epsilon) <= 1.25e-5
        assert curve.delta(epsilon * 2 + 1) < 1e-5 < curve.delta(epsilon / 2)
        assert curve.delta(0.0) <= 1
        assert curve.delta(math.inf) == 0

    def test_bound_says_how(self):
        bound = self.rule.curve(ROWS[0].event).bound(1e-5)
        assert bound.epsilon == self.price(ROWS[0].event)
        assert bound.method == self.rule.name
        assert any("adding or removing one record" in text for text in bound.assumptions)

    def test_refusals(self):
        curve = self.rule.curve(Gaussian(1.0))
        with pytest.raises(UnpricedEvent, match=r"PoissonSampled\.event must be a Gaussian"):
            self.rule.curve(PoissonSampled(0.1, Repeated(Gaussian(1.0), 2)))
        with pytest.raises(ValueError, match=r"delta must be a number in \[0, 1\); got 1"):
            curve.epsilon(1)
        with pytest.raises(ValueError, match="delta must be a number"):
            curve.epsilon(math.nan)
        with pytest.raises(ValueError, match="epsilon must be a number >= 0; got -1"):
            curve.delta(-1)
        with pytest.raises(ValueError, match=r"count must be an integer >= 0; got 1.5"):
            curve * 1.5
