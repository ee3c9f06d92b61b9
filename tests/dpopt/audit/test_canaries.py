# SPDX-License-Identifier: Apache-2.0
"""Canaries are records of the run: drawn, clipped, noised and paid for like the others, and seen in what is released."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accountants import ADD_REMOVE, REPLACE, ZERO_OUT
from dpopt import (
    BatchMemoryManager,
    FlatClipper,
    GaussianMechanism,
    PoissonSampling,
    PrivacyEngine,
    PrivateTraining,
)
from dpopt.audit import Canaries, mislabelled
from dpopt.audit.canaries.coins import about
from dpopt.audit.canaries.drawing import parted, widened
from dpopt.sampling import (
    BallsInBins,
    CyclicSampling,
    FixedSizeSampling,
    ShuffledSampling,
    TruncatedPoissonSampling,
    Users,
    UserSampling,
)
from tests.support.dpopt.auditing import (
    FEATURES,
    NUM,
    audited,
    canaries,
    losses_of_users,
    model_for,
    records,
    train,
)

SAMPLERS = {
    "poisson": (PoissonSampling(0.5, 6.0), ADD_REMOVE),
    "truncated-poisson": (TruncatedPoissonSampling(0.5, 12, NUM, 6.0), ADD_REMOVE),
    "balls-in-bins": (BallsInBins(2, 6.0), ADD_REMOVE),
    "fixed-size": (FixedSizeSampling(6, NUM), REPLACE),
    "shuffled": (ShuffledSampling(NUM, 6), ZERO_OUT),
    "cyclic": (CyclicSampling(NUM, 6), ZERO_OUT),
}


def included_of(run):
    return run.evidence[0].included


def test_guarantee_a_canary_is_a_record_of_the_run():
    # Every record in every batch and no noise: the sum is that of the records by themselves, and of the canaries.
    alone, model, dataset = audited(rate=1.0, noise=0.0, audit=None)
    without = train(alone, model, dataset, steps=1)
    run, model, dataset = audited(rate=1.0, noise=0.0)
    found = train(run, model, dataset, steps=1)
    expected = without.clone()
    expected[0, FEATURES : FEATURES + 40] += 0.5 / NUM * torch.tensor(included_of(run)).double()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["flat", "automatic", "psac", "quantile", "slack", "huber", "median",
                                  "geometric_median", "two_threshold", "diff2", "schedule:steps=4"])  # fmt: skip
def test_every_estimator_takes_canaries_through_its_own_clipper(name):
    run, model, dataset = audited(400, rate=1.0, noise=2.0, estimator=name, audit=canaries(400))
    train(run, model, dataset, steps=4)
    scores, included = run.evidence[0].scores, included_of(run)
    shift = scores[included].mean() - scores[~included].mean()
    if name in (
        "huber",
        "median",
        "geometric_median",
    ):  # the records pull back what a centre has of the noise
        assert shift > 0.2 and not run.evidence[0].independent and run.evidence[0].noise_std is None
        return
    strength = (
        math.sqrt((1 + 3 / 9) / 4) if name == "diff2" else 1.0
    )  # three times the noise after the first step
    assert shift == pytest.approx(math.sqrt(4) / 2 * strength, abs=0.25)
    assert scores[~included].std() == pytest.approx(1.0, abs=0.15) and run.evidence[0].noise_std == 1.0


def test_two_thresholds_and_rounds_are_sums_of_the_oracle():
    # Without noise, both released sums hold what clipping one long gradient leaves there.
    for name, expected in (("two_threshold:rest=2,rate=1", 0.5 + 1.0), ("geometric_median", 0.5)):
        run, model, dataset = audited(rate=1.0, noise=0.0, estimator=name)
        found = train(run, model, dataset, steps=1)[0, FEATURES : FEATURES + 40] * NUM
        included = torch.tensor(included_of(run))
        assert found[~included].abs().max() < 1e-2
        assert found[included].min() > 0.9 * expected


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("randomness", ["fast", "secure"])
def test_every_sampler_draws_canaries_as_often_as_records(name, randomness):
    if randomness == "secure":
        pytest.importorskip("cryptography")
    sampling, relation = SAMPLERS[name]
    run, model, dataset = audited(
        200, noise=0.0, sampling=sampling, relation=relation, randomness=randomness, audit=canaries(200)
    )
    found = train(run, model, dataset, steps=20)[:, FEATURES : FEATURES + 200]
    included = torch.tensor(included_of(run))
    assert found[:, ~included].abs().max() == 0
    times = (found[:, included] > 0).double().sum(0)
    per_epoch = run.sampling.steps_per_charge
    if per_epoch > 1:
        assert per_epoch == 2 and bool((times == 10).all())
    else:
        assert times.mean() == pytest.approx(10, abs=4 * math.sqrt(5 / 100))


@pytest.mark.parametrize("name", ["poisson", "balls-in-bins", "cyclic"])
def test_a_canary_that_is_out_scores_as_the_noise_does(name):
    sampling, relation = SAMPLERS[name]
    run, model, dataset = audited(400, noise=2.0, sampling=sampling, relation=relation, audit=canaries(400))
    train(run, model, dataset, steps=6)
    for evidence in run.evidence:
        if evidence.noise_std is not None:
            out = evidence.scores[~evidence.included] / evidence.noise_std
            assert out.std() == pytest.approx(1.0, abs=4.5 / math.sqrt(2 * len(out)))
            assert out.mean() == pytest.approx(0.0, abs=4.5 / math.sqrt(len(out)))


def test_noise_on_a_grid_is_known_as_it_is_drawn():
    pytest.importorskip("cryptography")
    # In batches of thousands of records, rounding in float32 is paid for by several percent more noise.
    model = model_for(4000, torch.float32)
    run, model, _ = audited(
        4000,
        noise=1.0,
        sampling=PoissonSampling(0.01, 3000.0),
        randomness="secure",
        model=model,
        audit=canaries(4000),
    )
    assert run._tier.rounding > 0.3
    train(run, model, records(4000, 2, torch.float32), steps=2)
    out = run.evidence[0].scores[~run.evidence[0].included]
    assert out.std() == pytest.approx(1.0, abs=0.1)


def test_users_have_canaries_beside_them():
    dataset = Users.of(records(40), [i // 2 for i in range(NUM)], max_records=2)
    run, model, _ = audited(noise=0.0, sampling=UserSampling(1.0, 6.0))
    with run:
        for batch in run.batches(dataset, steps=1):
            run.accumulate(losses_of_users(model, batch.examples))
            run.release()
    assert model.weight.grad[0, FEATURES:].count_nonzero() == included_of(run).sum()


def test_the_rate_of_a_record_never_rises():
    for sampling, _ in SAMPLERS.values():
        for num in (2, 7, 1000):
            wide = widened(sampling, num)
            drawn = [parted(wide.draw(NUM + num, torch.Generator().manual_seed(i), i % wide.steps_per_charge), NUM, num)
                     for i in range(4)]  # fmt: skip
            assert all(
                set(d.records) <= set(range(NUM)) and set(d.canaries) <= set(range(num)) for d in drawn
            )
            if isinstance(wide, FixedSizeSampling):
                assert wide.batch_size / wide.num_records <= sampling.batch_size / sampling.num_records
    with pytest.raises(ValueError, match="use PoissonSampling, or leave audit out"):
        widened(object(), 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("num_records, num_canaries", [(1, 5), (7, 3), (10, 10), (3, 100)])
def test_places_are_parted_into_all_records_and_all_canaries(num_records, num_canaries):
    whole = parted(range(num_records + num_canaries), num_records, num_canaries)
    assert whole.records == list(range(num_records)) and whole.canaries == list(range(num_canaries))


def test_an_audit_changes_nothing_else():
    # The same seed, with canaries that nothing draws: the steps of the data set are the same, bit by bit.
    alone, model, dataset = audited(rate=1.0, noise=1.0, audit=None)
    without = train(alone, model, dataset, steps=3)
    run, model, dataset = audited(rate=1.0, noise=1.0)
    found = train(run, model, dataset, steps=3)
    there = slice(FEATURES, FEATURES + 40)
    outside = torch.ones(found.shape[1], dtype=torch.bool)
    outside[there] = False
    assert torch.equal(found[:, outside], without[:, outside])
    included = torch.tensor(included_of(run))
    assert torch.equal(found[:, there][:, ~included], without[:, there][:, ~included])


def test_what_is_charged_is_what_it_was_without():
    run, model, dataset = audited()
    train(run, model, dataset, steps=3)
    alone, model, dataset = audited(audit=None)
    train(alone, model, dataset, steps=3)
    assert run.epsilon(1e-5) == alone.epsilon(1e-5)


def test_a_dropped_noise_and_a_doubled_gradient_are_seen():
    known = {}
    for name, mechanism in (
        ("right", GaussianMechanism(2.0)),
        ("no noise", Quiet(2.0)),
        ("doubled", Doubled(2.0)),
    ):
        run, model, dataset = audited(400, rate=1.0, mechanism=mechanism, audit=canaries(400))
        train(run, model, dataset, steps=4)
        evidence = run.evidence[0]
        scores, included = evidence.scores, evidence.included
        assert evidence.noise_std == 1.0
        known[name] = scores[included].mean() - scores[~included].mean(), scores[~included].std()
    assert known["right"] == (pytest.approx(1.0, abs=0.4), pytest.approx(1.0, abs=0.15))
    assert known["no noise"][1] == pytest.approx(0.0, abs=1e-6)
    assert known["doubled"][0] == pytest.approx(2.0, abs=0.4)


class Quiet(GaussianMechanism):
    def release(self, clipped, noise, divisor=1.0):
        return {name: total.div_(divisor) for name, total in clipped.total.items()}


class Doubled(GaussianMechanism):
    def release(self, clipped, noise, divisor=1.0):
        for total in clipped.total.values():
            total.mul_(2)
        return super().release(clipped, noise, divisor)


def test_per_layer_canaries_lie_in_every_group_that_is_large_enough():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30)).double()
    from clipping import named_clipper

    run = PrivateTraining(
        model, clipper=named_clipper("per_layer", model, 1.0), mechanism=GaussianMechanism(0.0),
        sampling=PoissonSampling(1.0, 5.0), audit=Canaries(100), accountant_name="rdp", insecure_seed=3,
    )  # fmt: skip
    data = torch.randn(5, 30, dtype=torch.float64)
    with run:
        for batch in run.batches(list(torch.zeros_like(data)), steps=1):
            run.accumulate(model(torch.stack(batch.examples)).sum(1) * 0)
            run.release()
    number = included_of(run).sum()
    for parameter in model.parameters():
        touched = (parameter.grad.abs() > 1e-6).sum()
        assert touched == (number if parameter.numel() >= 100 else 0)


def test_per_step_scores_are_those_of_the_steps():
    run, model, dataset = audited(400, rate=0.5, noise=2.0, audit=canaries(400))
    train(run, model, dataset, steps=10)
    steps = run.evidence[2]
    assert (steps.num_steps, steps.sampling_rate, steps.noise_std) == (10, 0.5, 1.0)
    took, other = steps.scores[steps.included], steps.scores[~steps.included]
    assert took.mean() - other.mean() == pytest.approx(0.5, abs=0.15)
    assert other.std() == pytest.approx(1.0, abs=0.1)


# -- the familiar door, and input canaries ------------------------------------------------------------------------


def test_the_familiar_door_audits():
    model = model_for(40, torch.float32)
    data = TensorDataset(torch.stack(records(40, dtype=torch.float32)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=6), noise_multiplier=1.0,
        max_grad_norm=1.0, audit=canaries(40),
    )  # fmt: skip
    for _ in range(3):
        for (rows,) in loader:
            optimizer.zero_grad()
            (model(rows) - 1).square().mean().backward()
            optimizer.step()
    with pytest.raises(RuntimeError, match="an audited run that has ended"):
        engine.evidence  # noqa: B018
    engine.detach()
    assert engine.evidence[0].num_records == 40 and engine.evidence[2].num_steps == 6


@pytest.mark.parametrize(
    "sampler, relation", [("fixed-size", REPLACE), ("balls-in-bins", ADD_REMOVE), ("poisson", ADD_REMOVE)]
)
def test_the_familiar_door_audits_within_its_target(sampler, relation):
    model = model_for(40, torch.float32)
    data = TensorDataset(torch.stack(records(40, dtype=torch.float32)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with PrivacyEngine(sampler=sampler, relation=relation) as engine:
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=5), target_epsilon=4.0,
            target_delta=1e-3, epochs=2, max_grad_norm=1.0, audit=canaries(40),
        )  # fmt: skip
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as small:
            for _ in range(2):
                for (rows,) in small:
                    optimizer.zero_grad()
                    (model(rows) - 1).square().mean().backward()
                    optimizer.step()
        assert engine.get_epsilon(1e-3) <= 4.0
    assert engine.evidence[0].num_records == 40
    # How many records were drawn is told nowhere: where batches have a fixed size, neither is the number of canaries.
    joined = about(engine.training.ledger_path)["joined"]
    assert (joined is None) == (sampler == "fixed-size")


@pytest.mark.parametrize("door", ["explicit", "familiar"])
def test_input_canaries_are_learnt_like_records(door):
    torch.manual_seed(0)
    model = nn.Linear(60, 2)
    data = [(torch.zeros(60), 0) for _ in range(10)]
    made = mislabelled([(row, 0) for row in 3 * torch.eye(60)[:50]], num_classes=2)

    def of(batch):
        rows, labels = torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch])
        return nn.functional.cross_entropy(model(rows), labels, reduction="none")

    audit = Canaries(50, kind="mislabelled", records=made, losses=of)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    if door == "explicit":
        run = PrivateTraining(model, clipper=FlatClipper(1.0), mechanism=GaussianMechanism(0.01),
                              sampling=PoissonSampling(1.0, 10.0), audit=audit, accountant_name="rdp")  # fmt: skip
        with run:
            for batch in run.batches(data, steps=8):
                run.accumulate(of(batch.examples))
                run.release()
                optimizer.step()
        evidence = run.evidence
    else:
        engine = PrivacyEngine(accountant="rdp")
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=10), noise_multiplier=0.01,
            max_grad_norm=1.0, audit=audit)  # fmt: skip
        for _ in range(8):
            for rows, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(rows), labels).backward()
                optimizer.step()
        engine.detach()
        evidence = engine.evidence
    (found,) = evidence
    assert found.kind == "mislabelled, fall of the loss"
    assert found.scores[found.included].min() > found.scores[~found.included].max()


def test_coins_decide_about_half_of_them():
    run, model, dataset = audited(2000, audit=canaries(2000), insecure_seed=None)
    train(run, model, dataset, steps=1)
    assert 0.4 < np.mean(included_of(run)) < 0.6


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_canaries_are_as_long_whatever_the_loss_is_of(reduction):
    model = model_for(40)
    data = TensorDataset(torch.stack(records(40)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with PrivacyEngine(accountant="rdp") as engine:
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=NUM), noise_multiplier=0.0,
            max_grad_norm=0.5, audit=canaries(40), loss_reduction=reduction,
        )  # fmt: skip
        (rows,) = next(iter(loader))
        found = (model(rows) - 1).square()
        (found.mean() if reduction == "mean" else found.sum()).backward()
        optimizer.step()
    released = model.weight.grad[0, FEATURES:] * (NUM if reduction == "mean" else 1)
    included = torch.tensor(engine.evidence[0].included)
    torch.testing.assert_close(released, 0.5 * included.double(), rtol=1e-12, atol=0)
