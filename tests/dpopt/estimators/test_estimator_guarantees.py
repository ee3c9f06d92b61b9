# SPDX-License-Identifier: Apache-2.0
"""The guarantees that the docstrings of `dpopt.estimators` quote: what is charged is what each step releases.

Shapes: B examples, P numbers of the model.
"""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from accountants import (
    Gaussian,
    HiddenFeedback,
    PoissonSampled,
    Repeated,
    accountant,
    leaves,
)
from clipping import ClippedSum, Clipping, Contribution, Dense, FlatClipper, Sums
from clipping.contributions.error_feedback import HiddenState
from clipping.contributions.record_memory import Memory
from dpopt import Budget, GaussianMechanism, PoissonSampling
from dpopt.budget.prices import priced, prices
from dpopt.estimators import (
    Centred,
    Clip21,
    Dice,
    Difference,
    Quantile,
    Run,
    Scheduled,
    Slack,
    TwoThreshold,
    named_estimator,
)
from dpopt.estimators.step_mechanism import mechanism_of
from dpopt.release.release import noise_stds
from tests.support.accountants.transcripts import Pair, dice, hockey_stick, losses
from tests.support.dpopt.estimator_runs import collect, gradient_of, mlp, opened, vectors
from tests.support.dpopt.private_runs import NOBODY, losses_of

Z, C, N = 1.3, 0.5, 8
TEXTS = (
    "flat",
    "per_layer:automatic",
    "schedule:steps=3,clip_end=0.3,noise_end=0.5",
    "quantile",
    "slack",
    "median",
    "huber",
    "coordinate_median",
    "geometric_median:rounds=3",
    "two_threshold",
    "clip21",
    "diff2:restart=2,ratio=3",
    "dice",
    "dice:bound=2",
)


class Wide(nn.Module):
    """Ten thousand numbers without a gradient to speak of: a release tells the noise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(100, 100, bias=False).double()

    def forward(self, inputs):
        return self.layer(inputs)


def stds_of(private, model, steps, divisor):
    """The standard deviation of the noise of each release, over what the divisor leaves of it."""
    found = []
    for _ in private.batches([], steps=steps):
        private.release()
        found.append(gradient_of(model).std().item() * divisor)
        assert private.noise_stds.get("layer.weight", found[-1] / divisor) == pytest.approx(
            found[-1] / divisor, rel=0.05
        )
    return found


# -- what the ledger says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_the_ledger_holds_what_the_run_was_priced_at(text, tmp_path):
    model, sampling = mlp(), PoissonSampling(0.5, 4.0)
    estimator = named_estimator(text, Run(model, C, N, sampling))
    expected = priced(estimator, sampling, 3)(Z)
    path = tmp_path / "ledger.jsonl"
    with opened(model, estimator, sampling=sampling, noise=Z, ledger=path) as private:
        for batch in private.batches(vectors(N), steps=3):
            collect(private, model, losses_of, batch)
            private.release()
        assert leaves(private.ledger.events()) == leaves(expected)
        assert private.epsilon(1e-5) == accountant("rdp").curve(expected).epsilon(1e-5)
        assert private.ledger.num_charges == 3
    (attempt,) = (r for r in map(json.loads, path.read_bytes().splitlines()) if r["kind"] == "attempt")
    assert json.loads(json.dumps(dict(estimator.setting))) == found(attempt, "estimator")
    kinds = {type(leaf) for leaf, _ in leaves(expected)}
    assert kinds == {HiddenFeedback if text.startswith("dice") else PoissonSampled}


def found(record, key):
    """The value of the first `key` anywhere in a record."""
    if isinstance(record, dict):
        if key in record:
            return record[key]
        record = list(record.values())
    for value in record if isinstance(record, list) else ():
        inner = found(value, key)
        if inner is not None:
            return inner
    return None


@pytest.mark.parametrize("text", TEXTS)
def test_exact_noise_serves_every_estimator_at_the_same_price(text):
    pytest.importorskip("cryptography")
    model, sampling = mlp(), PoissonSampling(0.5, 4.0)
    estimator = named_estimator(text, Run(model, C, N, sampling))
    with opened(
        model, estimator, sampling=sampling, noise=Z, randomness="secure", insecure_seed=None
    ) as private:
        for batch in private.batches(vectors(N), steps=3):
            collect(private, model, losses_of, batch)
            private.release()
            assert torch.isfinite(gradient_of(model)).all()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert leaves(private.ledger.events()) == leaves(priced(estimator, sampling, 3)(Z))


@pytest.mark.parametrize("text", TEXTS)
def test_a_budget_ends_the_run_where_its_price_is_reached(text):
    model, sampling = mlp(), PoissonSampling(0.5, 4.0)
    estimator = named_estimator(text, Run(model, C, N, sampling))
    price = priced(estimator, sampling, 5)(8.0)
    epsilon = accountant("rdp").curve(price).epsilon(1e-5) * (1 + 1e-9)
    with opened(model, estimator, sampling=sampling, noise=8.0, budget=Budget(epsilon, 1e-5)) as private:
        assert private.steps_left == 5


@pytest.mark.parametrize("noise_end", [0.25, 4.0])
@pytest.mark.parametrize("which", ["schedule", "diff2"])
def test_guarantee_each_step_is_charged_with_its_own_noise(which, noise_end):
    model, steps = Wide(), 5
    if which == "schedule":
        estimator = Scheduled(C, 4, clip_end=0.5, noise_end=noise_end)
        done = [0.0, 0.33, 0.67, 1.0, 1.0]
        factors, clip_norms = [noise_end**d for d in done], [C * 0.5**d for d in done]
    else:
        estimator = Difference(C, lambda: dict(model.named_parameters()), 2.0, restart=3, ratio=noise_end)
        factors, clip_norms = [1.0, noise_end, noise_end, 1.0, noise_end], [C, 2e-4, 2e-4, C, 2e-4]
    with opened(model, estimator, rate=NOBODY, noise=Z, sampling=PoissonSampling(NOBODY, 10.0)) as private:
        stds = []
        for _ in private.batches([], steps=steps):
            before = (
                0.0
                if which == "schedule" or len(stds) in (0, 3)
                else private.estimator.gradient["layer.weight"]
            )
            private.release()
            stds.append((model.layer.weight.grad - before).std().item() * 10.0)
        charged = private.ledger.events()
    expected = [PoissonSampled(NOBODY, Gaussian(Z * factor)) for factor in factors]
    assert sorted(leaves(charged), key=repr) == sorted(
        {(event, expected.count(event)) for event in expected}, key=repr
    )
    for std, factor, clip_norm in zip(stds, factors, clip_norms, strict=True):
        assert std == pytest.approx(
            Z * factor * clip_norm, rel=0.04
        )  # 10,000 numbers: within 0.7% one time in three


@pytest.mark.parametrize(
    "text",
    ["flat", "median:rate=0.5", "huber:rate=1", "coordinate_median:rate=1", "slack", "dice:feedback=0.02"],
)
def test_the_noise_is_that_of_the_charge(text):
    model = Wide()
    with opened(model, text, noise=Z, sampling=PoissonSampling(NOBODY, 10.0), clip=C) as private:
        (std,) = stds_of(private, model, 1, 10.0)
    sensitivity = C * 1.04 if text.startswith("dice") else C
    assert std == pytest.approx(Z * sensitivity * (0.5 if "0.5" in text else 1.0), rel=0.04)


# -- sums that share a release -----------------------------------------------------------------------------------


def stds(estimator, contribution, sizes):
    groups = contribution.released((("w",),))
    mechanism = mechanism_of(estimator, GaussianMechanism(Z), 0)
    return [g.sensitivity for g in groups], mechanism.stds([g.sensitivity for g in groups], sizes)


@given(st.floats(1e-6, 1e6), st.floats(1e-4, 0.9), st.integers(1, 10**6))
def test_guarantee_the_count_is_paid_for(clip_norm, share, size):
    estimator = Quantile(clip_norm, share=share)
    sensitivities, noise = stds(estimator, estimator.stage(0).contribution, (size, 1))
    assert sensitivities == [clip_norm, 0.5]
    assert math.fsum((c / s) ** 2 for c, s in zip(sensitivities, noise, strict=True)) == pytest.approx(Z**-2)
    assert (0.5 / noise[1]) ** 2 == pytest.approx(share / Z**2)


def test_the_count_gets_the_noise_that_pays_for_it(monkeypatch):
    """As drawn: the clip norm after one step on nobody tells the count."""
    model, drawn = mlp(), []
    original = Quantile._finish

    def look(self, released):
        drawn.append(released["count:below"].item())
        return original(self, released)

    monkeypatch.setattr(Quantile, "_finish", look)
    estimator = Quantile(C, share=0.04)
    with opened(model, estimator, noise=Z, sampling=PoissonSampling(NOBODY, 10.0)) as private:
        for _ in private.batches([], steps=500):
            private.release()
    expected = Z * 0.5 / math.sqrt(0.04) / 10
    assert np.std(drawn) == pytest.approx(expected, rel=0.15)
    assert abs(np.mean(drawn)) < 5 * expected / math.sqrt(500)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0.01, 1.0), st.integers(1, 10**6))
def test_guarantee_two_thresholds_are_one_gaussian(first, rest, rate, size):
    estimator = TwoThreshold(first, rest, rate)
    sensitivities, noise = stds(estimator, estimator.stage(0).contribution, (size, size))
    assert sensitivities == [first, rest]
    multipliers = [s / c for c, s in zip(sensitivities, noise, strict=True)]
    assert math.fsum(m**-2 for m in multipliers) == pytest.approx(Z**-2)


@given(st.floats(1e-2, 1e2), st.floats(1e-2, 1e2), st.floats(0.01, 1.0))
def test_the_split_has_the_least_variance(first, rest, rate):
    kappa = rate / (2 - rate)

    def variance(fraction):
        return Z**2 * first**2 / fraction + kappa * Z**2 * rest**2 / (1 - fraction)

    estimator = TwoThreshold(first, rest, rate)
    _, (one, two) = stds(estimator, estimator.stage(0).contribution, (3, 3))
    least = minimize_scalar(variance, bounds=(1e-9, 1 - 1e-9), method="bounded").fun
    assert one**2 + kappa * two**2 == pytest.approx(Z**2 * (first + math.sqrt(kappa) * rest) ** 2)
    assert one**2 + kappa * two**2 <= least * (1 + 1e-6)


def test_the_average_has_that_variance():
    """As drawn: many steps on nobody, whose gradient is noise alone."""
    model, rate = Wide(), 0.3
    estimator = TwoThreshold(C, 4 * C, rate)
    with opened(model, estimator, noise=Z, sampling=PoissonSampling(NOBODY, 1.0)) as private:
        for _ in private.batches([], steps=25):
            private.release()
    kappa = rate / (2 - rate)
    assert gradient_of(model).std().item() == pytest.approx(Z * C * (1 + 4 * math.sqrt(kappa)), rel=0.04)


def total_of(contribution, rows):
    """The released sum of examples whose one parameter has these gradients (B, P)."""
    sums = Sums(contribution, contribution.clipper.groups(["w"]))
    if len(rows):
        collector = Clipping(sums, lambda name: False, lambda num: None)
        collector.ready("w", Dense(rows), len(rows))
        collector.complete(len(rows))
    return sums.totals.get("w", torch.zeros(rows.shape[1], dtype=rows.dtype))


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
    st.booleans(),
)
def test_guarantee_a_public_centre_costs_nothing(centre, gradient, clamped):
    """Added or removed an example moves the sum by clip_norm at most, replaced by twice that, wherever the centre is."""
    estimator = Centred(C, coordinates=2 if clamped else None)
    centre, gradient = (torch.tensor(x, dtype=torch.float64) for x in (centre, gradient))
    estimator.centre["w"] = centre
    contribution = estimator.stage(1).contribution
    others = torch.stack((centre + 1, -centre))
    without = total_of(contribution, others)
    for worst in (gradient, centre + 1e9 * gradient, centre):
        with_it = total_of(contribution, torch.cat((others, worst.unsqueeze(0))))
        replaced = total_of(contribution, torch.cat((others, (2 * centre - worst).unsqueeze(0))))
        assert (with_it - without).norm() <= C * (1 + 1e-7)
        assert (with_it - replaced).norm() <= 2 * C * (1 + 1e-7)
    assert estimator.event(PoissonSampling(0.1, 1.0), Gaussian(Z)) == PoissonSampled(0.1, Gaussian(Z))


def test_guarantee_rounds_on_one_draw_cost_one_release(monkeypatch):
    """R releases of one draw, each with sqrt(R) times the noise of what is charged, and noise of their own."""
    model, rounds, drawn = Wide(), 4, []
    original = GaussianMechanism.release

    def look(self, clipped, noise, divisor):
        drawn.append({n: v.clone() for n, v in original(self, clipped, noise, divisor).items()})
        return {n: v.clone() for n, v in drawn[-1].items()}

    monkeypatch.setattr(GaussianMechanism, "release", look)
    estimator = Centred(C, rate=1.0, rounds=rounds)
    with opened(model, estimator, noise=Z, sampling=PoissonSampling(NOBODY, 10.0)) as private:
        for _ in private.batches([], steps=1):
            private.release()
        assert leaves(private.ledger.events()) == ((PoissonSampled(NOBODY, Gaussian(Z)), 1),)
    values = [next(iter(x.values())).flatten() for x in drawn]
    assert len(values) == rounds
    energy = [(C / (10 * v.std().item())) ** 2 for v in values]
    assert math.fsum(energy) == pytest.approx(Z**-2, rel=0.05)
    for i in range(rounds):
        for j in range(i):
            assert abs(torch.corrcoef(torch.stack((values[i], values[j])))[0, 1]) < 0.06
    torch.testing.assert_close(gradient_of(model), sum(values))


# -- differences -------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 12), st.sampled_from([0.5, 1.0, 3.0]), st.floats(0.5, 20))
def test_guarantee_differences_cost_exactly_rho(steps, restart, ratio, noise):
    estimator = Difference(C, dict, 1.0, restart, ratio)
    whole = sum(t % restart == 0 for t in range(steps))
    rho = whole / (2 * noise**2) + (steps - whole) / (2 * (noise * ratio) ** 2)
    curve = accountant("zcdp").curve(priced(estimator, PoissonSampling(1.0, 8.0), steps)(noise))
    assert curve.rho == pytest.approx(rho, rel=1e-12)
    if steps % restart == 0:  # as in the docstring
        rounds = steps / restart
        assert rho == pytest.approx(rounds / (2 * noise**2) + (steps - rounds) / (2 * (noise * ratio) ** 2))


def test_a_long_step_takes_a_whole_gradient_at_the_noise_of_its_own_charge():
    """smoothness |x - x'| >= clip_norm: the difference is given up, its place in the schedule is not."""
    model = Wide()
    estimator = Difference(C, lambda: dict(model.named_parameters()), 2.0, restart=3, ratio=3.0)
    clip_norms, stds = [], []
    with opened(model, estimator, noise=Z, sampling=PoissonSampling(NOBODY, 10.0)) as private:
        for step, _ in enumerate(private.batches([], steps=5)):
            stage = private.estimator.stage(step)
            assert (stage.previous is None) is (step != 4)
            clip_norms.append(stage.contribution.clipper.clip_norm)
            before = private.estimator.gradient["layer.weight"].clone() if step == 4 else 0.0
            private.release()
            stds.append((model.layer.weight.grad - before).std().item() * 10.0 / clip_norms[-1])
            with torch.no_grad():  # by 1, 0.25, and a hair less: C / smoothness is 0.25
                model.layer.weight += [1.0, 0.2500001, 0.0, 0.2499, 0.0][step] / 100
    assert clip_norms[:4] == [C] * 4 and clip_norms[4] == pytest.approx(0.4998, rel=1e-6)
    assert stds == pytest.approx([Z, 3 * Z, 3 * Z, Z, 3 * Z], rel=0.04)


# -- hidden state of single records -----------------------------------------------------------------------------------


def remembering(threshold, rate):
    """Clip21 in one dimension, as a transition of `transcripts`: the state is the record's own memory."""

    def transition(state, coin, sign):
        sent = np.clip(sign * 5.0 * threshold - state, -threshold, threshold)
        return coin * sent, state + coin * rate * sent

    return transition


def against_the_past(t, outputs):
    return np.where(outputs.sum(axis=1) >= 0, -1.0, 1.0)


def by_turns(t, outputs):
    return np.full(len(outputs), 1.0 if t % 4 < 2 else -1.0)


RUNS = {
    "always new": (8, 0.3, 1.5, 0.1, None),
    "reaches its gradient": (10, 0.5, 2.0, 1.0, None),
    "against the releases": (8, 0.3, 1.5, 1.0, against_the_past),
    "by turns": (8, 0.5, 2.0, 1.0, by_turns),
    "slowly, against the releases": (8, 0.2, 1.0, 0.5, against_the_past),
}


@pytest.mark.parametrize("case", RUNS)
def test_guarantee_a_record_with_memory_is_dominated_by_the_sampled_gaussian(case):
    """Whole transcripts with exact likelihood ratios: delta is at most what is charged, in both directions."""
    steps, q, sigma, rate, sign = RUNS[case]
    sampling = PoissonSampling(q, q * N)
    estimator = Clip21(1.0, N, q, rate)
    curve = accountant("pld").curve(priced(estimator, sampling, steps)(sigma))
    pair, rng = Pair(steps, q, sigma, remembering(1.0, rate), sign=sign), np.random.default_rng(1)
    there = losses(pair, 10_000, present=True, rng=rng)
    gone = -losses(pair, 10_000, present=False, rng=rng)
    assert np.exp(-there).mean() == pytest.approx(1, abs=0.15)
    for epsilon in (0.0, *(curve.epsilon(delta) for delta in (0.3, 0.1, 0.03))):
        for values in (there, gone):
            seen, margin = hockey_stick(values, epsilon)
            assert seen - margin <= curve.delta(epsilon)
    if case == "always new":  # the bound is attained by a record whose gradient stays out of reach
        seen, margin = hockey_stick(there, 0.0)
        assert seen + margin >= curve.delta(0.0)


def test_the_simulated_memory_is_the_one_that_runs():
    memory, transition, state = Memory(1, 1.0, 0.5), remembering(1.0, 0.5), 0.0
    rng = np.random.default_rng(0)
    for _ in range(30):
        coin, sign = float(rng.random() < 0.5), float(rng.choice([-1, 1]))
        expected, state = transition(state, coin, sign)
        contribution = memory.contribution()
        rows = torch.tensor([[5.0 * sign]]).double()[: int(coin)]
        sent = total_of(contribution.of_records([0]) if coin else contribution, rows)
        memory.keep()
        assert sent.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


# -- hidden state that all records share ------------------------------------------------------------------------------

HUGE = 1e6
FED = {
    "long gradients": (8, 0.5, 0.5, 3.0, HUGE, -HUGE / 2, None),
    "long gradients, against the releases": (8, 0.5, 0.5, 3.0, HUGE, -HUGE / 2, against_the_past),
    "bounded residuals": (8, 0.3, 4.0, 3.0, 1.0, 0.0, None),
    "bounded residuals, by turns": (8, 0.5, 1.0, 3.0, 0.5, 0.0, by_turns),
}


@pytest.mark.parametrize("case", FED)
def test_guarantee_dice_is_charged_above_its_worst_pair(case, tmp_path):
    """`transcripts` simulate a record that is there or not; the run's own ledger says what is charged."""
    steps, q, feedback, sigma, residual, start, sign = FED[case]
    bound = None if residual == HUGE else C * (1 + residual)
    estimator = Dice(C, C * feedback, bound)
    noise = sigma * C / estimator.sensitivity
    model, sampling = mlp(), PoissonSampling(q, q * N)
    with opened(model, estimator, sampling=sampling, noise=noise) as private:
        for batch in private.batches(vectors(N), steps=steps):
            collect(private, model, losses_of, batch)
            private.release()
        event = private.ledger.events()
    ((leaf, count),) = leaves(event)
    assert count == steps and leaf.residual == (None if bound is None else pytest.approx(residual))
    assert (leaf.sampling_rate, leaf.noise_multiplier, leaf.feedback) == pytest.approx((q, sigma, feedback))
    curve = accountant("pld").curve(Repeated(leaf, steps))
    pair, rng = Pair(steps, q, sigma, dice(1.0, feedback, residual), start, sign), np.random.default_rng(1)
    there = losses(pair, 10_000, present=True, rng=rng)
    gone = -losses(pair, 10_000, present=False, rng=rng)
    for epsilon in (0.0, *(curve.epsilon(delta) for delta in (0.3, 0.1, 0.03))):
        for values in (there, gone):
            seen, margin = hockey_stick(values, epsilon)
            assert seen - margin <= curve.delta(epsilon)


def test_the_simulated_error_is_the_one_that_runs():
    feedback, residual = 0.5, 3.0
    state, error, rng = HiddenState(feedback), 0.0, np.random.default_rng(0)
    transition = dice(1.0, feedback, residual)
    for _ in range(40):
        coin, sign = float(rng.random() < 0.5), float(rng.choice([-1, 1]))
        expected, error = transition(error, coin, sign)
        total, cut = (torch.tensor([coin * sign * x]).double() for x in (1.0, residual))
        given_ = state.give({"w": total}, {"w": cut})["w"].item()
        state.keep()
        assert given_ == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_dice_gets_noise_for_the_whole_of_what_moves():
    model = Wide()
    estimator = Dice(C, 2.0)
    with opened(model, estimator, noise=Z, sampling=PoissonSampling(NOBODY, 1.0)) as private:
        for _ in private.batches([], steps=1):
            private.release()
        ((leaf, _),) = leaves(private.ledger.events())
    assert gradient_of(model).std().item() == pytest.approx(Z * (C + 4.0), rel=0.04)
    assert leaf == HiddenFeedback(NOBODY, Z * (C + 4.0) / C, 2.0 / C, None)


def test_stds_of_a_contribution_without_state():
    """What is told as the noise of the gradient is told of released gradients only."""
    direct = [Slack(C), Quantile(C), Dice(C, 0.1), Scheduled(C, 3)]
    state = [Centred(C), TwoThreshold(C, 1.0), Clip21(C, N, 0.5), Difference(C, dict)]
    assert [e.stage(0).direct for e in (*direct, *state)] == [True] * 4 + [False] * 4
    contribution = Contribution(FlatClipper(C))
    assert prices(direct[0], PoissonSampling(0.5, 4.0), GaussianMechanism(Z)).constant
    groups = contribution.released((("w",),))
    one = ClippedSum({"w": torch.zeros(2)}, C, groups)
    assert noise_stds(GaussianMechanism(Z), one, 4.0) == {"w": pytest.approx(Z * C / 4)}
