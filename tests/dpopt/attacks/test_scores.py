# SPDX-License-Identifier: Apache-2.0
"""Attacks from signals: each against its formula written out record by record, and what a null finds."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from dpopt.attacks import scores as attacks
from dpopt.attacks.battery import Signals, all_scores, lower_bound, run_attacks
from dpopt.attacks.token_scores import TokenSignals, min_k_scores, token_info_rmia, token_info_rmia_scores
from dpopt.audit.bounds.families import GAUSSIAN, any_mechanism

RANDOM = np.random.default_rng(0)


def shadows(models=12, records=9, shift=1.0, seed=1):
    random = np.random.default_rng(seed)
    included = np.array([random.permutation(models) < models // 2 for _ in range(records)]).T
    signals = random.normal(size=(models, records)) * random.uniform(0.5, 2, records) + shift * included
    return random.normal(size=records), signals, included


def test_calibration_subtracts_the_mean_reference_loss():
    losses, references = RANDOM.normal(size=5), RANDOM.normal(size=(3, 5))
    expected = [sum(references[:, i]) / 3 - losses[i] for i in range(5)]
    np.testing.assert_allclose(attacks.calibrated_scores(losses, references), expected)
    np.testing.assert_array_equal(attacks.loss_scores(losses), -losses)


def test_logit_confidence_is_the_logit_and_stays_finite():
    p = np.array([1e-300, 0.1, 0.5, 0.999])
    np.testing.assert_allclose(attacks.logit_confidences(np.log(p)), np.log(p) - np.log1p(-p))
    assert np.isfinite(attacks.logit_confidences(np.array([0.0, -1e-300]))).all()


@pytest.mark.parametrize("per_record", [True, False])
def test_online_lira_is_the_ratio_of_two_gaussians(per_record):
    phi, signals, included = shadows()
    found = attacks.lira_online_scores(phi, signals, included, per_record=per_record)
    deviations = {}
    for side in (True, False):
        residuals = [signals[included[:, i] == side, i] for i in range(len(phi))]
        residuals = [one - one.mean() for one in residuals]
        pooled = math.sqrt(sum((one**2).sum() for one in residuals) / sum(len(one) - 1 for one in residuals))
        deviations[side] = [
            one.std() * math.sqrt(len(one) / (len(one) - 1)) if per_record else pooled for one in residuals
        ]
    for i, x in enumerate(phi):
        inside, outside = signals[included[:, i], i], signals[~included[:, i], i]
        ratio = norm.pdf(x, inside.mean(), deviations[True][i]) / norm.pdf(
            x, outside.mean(), deviations[False][i]
        )
        assert found[i] == pytest.approx(math.log(ratio), rel=1e-9)


def test_offline_lira_orders_as_the_probability_of_a_smaller_score_and_goes_on_where_that_rounds():
    phi, signals, included = shadows()
    found = attacks.lira_offline_scores(phi, signals, included, per_record=True)
    expected = [
        norm.cdf(x, *(lambda out: (out.mean(), out.std(ddof=1)))(signals[~included[:, i], i]))
        for i, x in enumerate(phi)
    ]
    np.testing.assert_allclose(norm.cdf(found), expected)
    far = attacks.lira_offline_scores(phi + np.array([60.0] * 8 + [61.0]), signals, included)
    near = attacks.lira_offline_scores(phi + 60.0, signals, included)
    assert far[8] > near[8]


def test_lira_pools_spreads_until_there_are_enough_shadow_scores():
    for models, own in ((2 * attacks.ENOUGH_PER_RECORD, True), (2 * attacks.ENOUGH_PER_RECORD - 2, False)):
        phi, signals, included = shadows(models=models)
        chosen = attacks.lira_online_scores(phi, signals, included)
        np.testing.assert_array_equal(
            chosen, attacks.lira_online_scores(phi, signals, included, per_record=own)
        )


def test_lira_refuses_records_without_shadow_models_on_a_side():
    phi, signals, included = shadows()
    included[:, 3] = True
    with pytest.raises(ValueError, match="none for 1 of 9 records"):
        attacks.lira_online_scores(phi, signals, included)
    with pytest.raises(ValueError, match="train more"):
        attacks.lira_online_scores(
            phi, signals[:2], shadows()[2][:1].repeat(2, 0) ^ np.array([[True], [False]])
        )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.7])
def test_rmia_counts_the_population_records_that_are_beaten(gamma):
    p, pz = RANDOM.uniform(0.01, 0.9, 7), RANDOM.uniform(0.01, 0.9, 11)
    q, qz = RANDOM.uniform(0.01, 0.9, (3, 7)), RANDOM.uniform(0.01, 0.9, (3, 11))
    ratios = np.log(p) - attacks.mean_probabilities(np.log(q))
    population = np.log(pz) - attacks.mean_probabilities(np.log(qz))
    found = attacks.rmia_scores(ratios, population, gamma=gamma)
    for i in range(7):
        beaten = [(p[i] / q[:, i].mean()) / (pz[j] / qz[:, j].mean()) >= gamma for j in range(11)]
        assert found[i] == pytest.approx(np.mean(beaten))
        expected = np.mean([math.log((p[i] / q[:, i].mean()) / (pz[j] / qz[:, j].mean())) for j in range(11)])
        assert attacks.info_rmia_scores(ratios, population)[i] == pytest.approx(expected)


def test_the_mean_probability_offline_is_half_in_half_out():
    q, included = RANDOM.uniform(0.01, 0.9, (4, 5)), np.zeros((4, 5), bool)
    included[0, 2] = True
    for a in (0.0, 0.3, 1.0):
        out = np.array([q[~included[:, i], i].mean() for i in range(5)])
        expected = (out + (a * out + 1 - a)) / 2
        np.testing.assert_allclose(
            attacks.mean_probabilities(np.log(q), included, offline_a=a), np.log(expected)
        )
    np.testing.assert_allclose(attacks.mean_probabilities(np.log(q), included), np.log(q.mean(0)))


def tokens(records=6, seed=0, reference=True):
    random = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(random.integers(1, 12, records))])
    draw = [
        -random.exponential(2.0, starts[-1]),
        -random.exponential(2.0, starts[-1]),
        random.uniform(0.5, 2, starts[-1]),
    ]
    more = [-random.exponential(2.0, starts[-1]), -random.exponential(0.3, starts[-1])] if reference else []
    return TokenSignals(draw[0], draw[1], draw[2], starts, *more)


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("standardised", [True, False])
def test_min_k_is_the_mean_of_the_lowest_tokens_of_each_record(share, standardised):
    one = tokens()
    found = min_k_scores(one, share=share, standardised=standardised)
    for i in range(one.num_records):
        place = slice(one.starts[i], one.starts[i + 1])
        values = one.log_prob[place]
        if standardised:
            values = (values - one.mean[place]) / one.std[place]
        kept = max(int(len(values) * share), 1)
        assert found[i] == pytest.approx(np.sort(values)[:kept].mean())


def test_token_scores_average_to_record_scores():
    one = tokens()
    each = token_info_rmia(one)
    np.testing.assert_allclose(each, one.log_prob - one.reference - one.expected_ratio)
    for i, score in enumerate(token_info_rmia_scores(one)):
        assert score == pytest.approx(each[one.starts[i] : one.starts[i + 1]].mean())
    with pytest.raises(ValueError, match="without"):
        token_info_rmia(tokens(reference=False))


def signals(records=300, seed=3, gain=0.0, member=None):
    """Losses of a model, a reference and eight shadow models on exchangeable records; members lose `gain`."""
    random = np.random.default_rng(seed)
    hard = random.gamma(4.0, 0.5, records)
    included = np.array(
        [row if s % 2 == 0 else ~row for s, row in enumerate(random.random((4, records)).repeat(2, 0) < 0.5)]
    )
    noise = lambda *shape: random.normal(0, 0.05, shape)  # noqa: E731
    losses = np.abs(hard + noise(records) - gain * (0 if member is None else member)) + 1e-3
    shadow = np.abs(hard + noise(8, records) - gain * included) + 1e-3
    return Signals(losses, None, np.abs(hard + noise(1, records)) + 1e-3, shadow, included)


def test_every_attack_finds_members_and_more_than_the_loss_alone():
    member = np.random.default_rng(5).random(300) < 0.5
    report = run_attacks(signals(gain=0.15, member=member), member)
    areas = {name: one.auc.value for name, one in report.attacks.items()}
    assert len(areas) == 9
    assert areas["loss"] < 0.65
    assert min(area for name, area in areas.items() if name != "loss") > 0.9


def test_scores_do_not_depend_on_the_order_of_the_records():
    given = signals(40)
    order = np.random.default_rng(0).permutation(40)
    turned = Signals(
        given.losses[order],
        None,
        given.reference_losses[:, order],
        given.shadow_losses[:, order],
        given.shadow_included[:, order],
    )
    for name, scores in all_scores(given).items():
        np.testing.assert_allclose(all_scores(turned)[name], scores[order], rtol=1e-9, err_msg=name)


def test_exchangeable_records_give_an_area_of_a_half():
    areas: dict[str, list[float]] = {}
    for seed in range(40):
        member = np.random.default_rng(seed).random(200) < 0.5
        for name, one in run_attacks(signals(200, seed=100 + seed), member).attacks.items():
            areas.setdefault(name, []).append(one.auc.value)
            assert one.bound.epsilon < 3
    for name, found in areas.items():
        assert abs(np.mean(found) - 0.5) < 4 * np.std(found) / math.sqrt(len(found)), name


def test_guarantee_the_best_of_many_attacks_is_paid_for():
    """Attacks on records that no model saw: the largest of all bounds is above 0 no more often than stated."""
    random, over, draws = np.random.default_rng(1), 0, 400
    for _ in range(draws):
        member = random.random(200) < 0.5
        scores = random.normal(size=(5, 200))
        over += any(
            lower_bound(one, member, "x", delta=0.0, confidence=1 - 0.05 / 5, family=family).epsilon > 0
            for one, family in zip(scores, [GAUSSIAN, any_mechanism(1e-5)] * 3, strict=False)
        )
    assert over <= 0.05 * draws + 3 * math.sqrt(0.05 * 0.95 * draws)


def test_an_order_of_tied_records_is_no_hint():
    member = np.arange(400) < 200  # as files list them
    for family in (GAUSSIAN, any_mechanism(1e-5)):
        found = lower_bound(np.zeros(400), member, "x", delta=1e-5, confidence=0.95, family=family)
        assert found.epsilon < 0.5


def test_a_control_that_tells_the_sets_apart_is_named():
    member = np.arange(100) < 50
    report = run_attacks(signals(100), member, controls={"length": np.arange(100.0), "fair": np.ones(100)})
    assert report.suspicious_controls == ["length"]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: attacks.loss_scores(np.array([1.0, np.nan])), "finite"),
        (lambda: attacks.calibrated_scores(np.ones(3), np.ones((2, 4))), "last of 3 records"),
        (lambda: attacks.rmia_scores(np.ones(3), np.ones(3), gamma=0.0), "gamma > 0"),
        (lambda: attacks.mean_probabilities(np.zeros((1, 2)), np.zeros((1, 2), bool), offline_a=2.0), "offline_a"),
        (lambda: attacks.lira_online_scores(np.ones(2), np.ones((4, 2)), np.ones((4, 2))), "booleans"),
        (lambda: min_k_scores(tokens(), share=0.0), "share in"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
