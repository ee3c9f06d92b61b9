# SPDX-License-Identifier: Apache-2.0
"""Curves under `+`, for every accountant in the registry, and calibration as the inverse of pricing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import Composed, Gaussian, PoissonSampled, Repeated, accountant, calibrate
from accountants.registry import ACCOUNTANTS
from tests.support.accountants.conformance import QUICK, deltas, sigmas

NAMES = sorted(ACCOUNTANTS)
parts = st.tuples(sigmas, st.sampled_from([0.02, 0.3, 1.0]), st.integers(1, 30))


def event(part):
    sigma, q, count = part
    return Repeated(PoissonSampled(q, Gaussian(sigma)), count)


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(parts, parts, parts, deltas)
def test_addition_is_associative_and_commutative(name, a, b, c, delta):
    x, y, z = (accountant(name).curve(event(part)) for part in (a, b, c))
    left, right, turned = ((x + y) + z), (x + (y + z)), (z + (x + y))
    expected = left.epsilon(delta)
    assert right.epsilon(delta) == pytest.approx(expected, rel=1e-12)
    assert turned.epsilon(delta) == pytest.approx(expected, rel=1e-12)
    whole = accountant(name).curve(Composed((event(b), event(c), event(a))))
    assert whole.epsilon(delta) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(
    epsilon=st.floats(0.3, 12), delta=deltas, q=st.sampled_from([0.01, 0.2, 1.0]), steps=st.integers(1, 400)
)
def test_calibration_inverts_pricing(name, epsilon, delta, q, steps):
    given_ = {"delta": delta, "sampling_rate": q, "steps": steps, "accountant": name}
    sigma = calibrate.noise_multiplier(epsilon=epsilon, **given_)
    assert calibrate.epsilon(noise_multiplier=sigma, **given_) <= epsilon
    if sigma > 0:
        assert calibrate.epsilon(noise_multiplier=sigma * 0.99, **given_) > epsilon
