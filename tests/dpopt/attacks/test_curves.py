# SPDX-License-Identifier: Apache-2.0
"""Curves and intervals against counting, and how often the intervals hold."""

import numpy as np
import pytest
from scipy.stats import norm

from dpopt.attacks.curves import auc, clopper_pearson, roc, tpr_at_fpr


def pair(m=60, k=50, shift=1.0, seed=0, digits=1):
    random = np.random.default_rng(seed)
    scores = np.concatenate([random.normal(shift, 1, m), random.normal(0, 1, k)]).round(digits)
    order = random.permutation(m + k)
    return scores[order], (np.arange(m + k) < m)[order]


def test_the_curve_counts_both_sides_at_every_threshold():
    scores, member = pair()
    curve = roc(scores, member)
    for false, true, threshold in zip(
        curve.false_positives, curve.true_positives, curve.thresholds, strict=True
    ):
        assert true == (scores[member] >= threshold).mean()
        assert false == (scores[~member] >= threshold).mean()
    assert (curve.false_positives[-1], curve.true_positives[-1]) == (1, 1)
    area = auc(scores, member).value
    heights = (curve.true_positives[1:] + curve.true_positives[:-1]) / 2
    assert (heights * np.diff(curve.false_positives)).sum() == pytest.approx(area)


def test_the_area_is_the_chance_of_the_right_order():
    scores, member = pair()
    own, others = scores[member][:, None], scores[~member][None]
    assert auc(scores, member).value == pytest.approx(((own > others) + 0.5 * (own == others)).mean())


def test_the_areas_interval_holds_as_often_as_it_says():
    true, held = norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(400):
        found = auc(*pair(seed=seed, digits=9))
        held += found.low <= true <= found.high
    assert 0.91 < held / 400 < 0.985


def test_perfect_and_useless_scores_have_intervals_too():
    member = np.arange(40) < 20
    perfect = auc(np.where(member, 1.0, 0.0), member)
    assert perfect.value == perfect.high == 1
    assert 0.8 < perfect.low < 0.9
    assert auc(np.zeros(40), member) == (0.5, 0.0, 1.0)
    assert auc(np.where(member, 0.0, 1.0), member).low == 0


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_the_interval_of_a_rate_holds_as_often_as_it_says(rate):
    true, held = norm.sf(norm.isf(rate) - 1), 0
    for seed in range(300):
        found = tpr_at_fpr(*pair(200, 600, seed=seed, digits=9), rate)
        assert found.low <= found.value <= found.high
        held += found.low <= true <= found.high
    assert held / 300 > 0.95  # it is exact for two one-sided parts, hence careful for both


def test_the_rate_at_few_false_positives_is_that_of_the_lowest_threshold_that_makes_no_more():
    scores, member = pair(100, 100, digits=9)
    for rate in (0.01, 0.05):
        allowed = np.sort(scores[~member])[::-1][int(rate * 100)]
        assert tpr_at_fpr(scores, member, rate).value == (scores[member] > allowed).mean()


def test_too_few_non_members_show_nothing_at_a_small_rate():
    found = tpr_at_fpr(*pair(500, 500, shift=9.0), 0.001)
    assert found.value > 0.9
    assert found.low == 0


def test_clopper_pearson_is_where_the_tails_are():
    from scipy.stats import binom

    low, high = clopper_pearson(7, 20, 0.05)
    assert binom.sf(6, 20, low) == pytest.approx(0.05)
    assert binom.cdf(7, 20, high) == pytest.approx(0.05)
    assert clopper_pearson(0, 5, 0.05)[0] == 0
    assert clopper_pearson(5, 5, 0.05)[1] == 1


def test_one_sided_sets_are_refused():
    with pytest.raises(ValueError, match="members and non-members"):
        auc(np.ones(3), np.ones(3, bool))
    with pytest.raises(ValueError, match="NaN"):
        roc(np.array([np.nan, 1.0]), np.array([True, False]))
    with pytest.raises(ValueError, match="false-positive rate"):
        tpr_at_fpr(*pair(), 0.0)
