# SPDX-License-Identifier: Apache-2.0
"""Users, padded batches, allocations and samplers by size: what is refused, and what adds nothing."""

import math

import pytest
import torch

from accountants import (
    ZERO_OUT,
    Gaussian,
    PoissonSampled,
    Repeated,
    accountant,
)  # fmt: skip
from dpopt import (
    Budget,
    BudgetExhausted,
    FlatClipper,
    GaussianMechanism,
    GroupGaussianMechanism,
    PoissonSampling,
    TruncatedPoissonSampling,
    Users,
    UserSampling,
    per_layer,
)  # fmt: skip
from dpopt.budget.budget import noise_within
from dpopt.sampling.registry import SAMPLERS, charges, sized
from tests.support.dpopt.private_runs import (
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    losses_of,
    mlp,
)
from tests.support.dpopt.sampler_cases import Numbers, run


def test_users_are_drawn_from_users_only_and_several_rows_of_one_are_refused():
    sampling = UserSampling(1.0, 4.0)
    with run(sampling) as private, pytest.raises(ValueError, match="expected a Users view"):
        next(private.batches(Numbers(), steps=1))
    data = examples(6)
    users = Users.of(data, [0, 0, 1, 1, 2, 2], max_records=2)
    model = mlp()
    with run(sampling, model=model) as private:
        for batch in private.batches(users, steps=1):
            with pytest.raises(RuntimeError, match="join the records of each into one example"):
                private.accumulate(losses_of(model, [row for user in batch.examples for row in user]))
            private.discard()
            private.accumulate(losses_of(model, [row for user in batch.examples for row in user[:1]]))
            private.release()


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_guarantee_a_padded_row_adds_nothing(two_pass, grouped):
    model, data = mlp(), examples(5)
    clipper = per_layer(model, 1.0) if grouped else FlatClipper(1.0)
    sums = []
    for filler in (
        None,
        (torch.full((4,), 1e30), torch.tensor(0)),
        (torch.full((4,), math.nan), torch.tensor(0)),
    ):
        sampling = TruncatedPoissonSampling(1 - 1e-12, 8, 8, 8.0)
        with run(
            sampling, model=model, mechanism=GaussianMechanism(0.0), clipper=clipper, two_pass=two_pass
        ) as private:
            for batch in private.batches(data, steps=1):
                if filler is None:
                    private.accumulate(losses_of(model, batch.examples))
                else:
                    rows, keep = batch.padded(8, filler)
                    private.accumulate(losses_of(model, rows[:4]), keep=keep[:4])
                    private.accumulate(losses_of(model, rows[4:]), keep=torch.tensor(keep[4:]))
                assert private.sum.num_added == 5
                private.release()
            sums.append({name: p.grad.clone() for name, p in model.named_parameters()})
    if not grouped:
        assert_gradients(model, clipped_mean(model, data))
    for found in sums[1:]:
        for name, value in sums[0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_real_example_must_not_be_masked_away():
    model, data = mlp(), examples(3)
    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            with pytest.raises(ValueError, match="one flag of keep for each loss"):
                private.accumulate(losses_of(model, batch.examples), keep=[True])
            private.accumulate(losses_of(model, batch.examples), keep=[True, True, False])
            with pytest.raises(RuntimeError, match="every drawn example in the losses, or none"):
                private.release()
            private.discard()
            private.accumulate(losses_of(model, batch.examples))
            private.release()


def test_an_allocation_is_checked_before_anything_is_charged(tmp_path):
    model = mlp()
    options = {"clipper": per_layer(model, 1.0), "ledger": tmp_path / "l"}
    for randomness in ("fast", "secure"):
        bad = GroupGaussianMechanism(1.0, allocation=lambda bounds, sizes: [1.0, -1.0])
        with pytest.raises(ValueError, match="expected 2 finite shares > 0 of the budget"):
            run(PoissonSampling(0.5, 1.0), model=model, mechanism=bad, randomness=randomness, **options)
    with pytest.raises(ValueError, match="whose rounding would take the other half"):
        run(PoissonSampling(0.5, 1.0), model=model, mechanism=GaussianMechanism(2.0**26), randomness="secure")
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "users"])
def test_samplers_by_name_and_size(name):
    sampling = sized(name, num_records=1000, batch_size=30)
    assert isinstance(sampling, SAMPLERS[name])
    assert sampling.expected_batch_size == pytest.approx(30, rel=0.02)
    assert charges(sampling, 35) == (2 if sampling.steps_per_charge == 34 else 35)
    if name == "truncated-poisson":
        price = accountant("rdp").curve(Repeated(sampling.event(Gaussian(1.0)), 1000)).epsilon(1e-6)
        whole = PoissonSampling(0.03, 30.0)
        assert price == pytest.approx(
            accountant("rdp").curve(Repeated(whole.event(Gaussian(1.0)), 1000)).epsilon(1e-6), rel=1e-3
        )


@pytest.mark.parametrize("name", ["shuffled", "fixed-size", "poisson"])
def test_guarantee_the_least_noise_was_priced(name):
    sampling, rule, budget = (
        sized(name, num_records=100, batch_size=10),
        accountant("rdp", ZERO_OUT),
        Budget(2.0, 1e-5),
    )

    def whole(noise):
        return Repeated(sampling.event(Gaussian(noise)), 20)

    noise = noise_within(budget, rule, whole)
    price = [rule.curve(whole(x)).epsilon(1e-5) for x in (noise, noise / 1.003)]
    assert price[0] <= 2.0 < price[1]
    with pytest.raises(BudgetExhausted, match="to pay for the run"):
        noise_within(Budget(1e-9, 1e-12), rule, whole)
    tight = accountant("pld", ZERO_OUT)
    with pytest.raises(
        ValueError, match=r"expected a budget that asks for noise; .* choose delta below 1 / "
    ):
        noise_within(Budget(1.0, 0.5), tight, lambda noise: PoissonSampled(0.01, Gaussian(noise)))
