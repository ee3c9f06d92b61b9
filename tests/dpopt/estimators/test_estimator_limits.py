# SPDX-License-Identifier: Apache-2.0
"""Where estimators meet each other, the ordinary optimizers, and what other libraries compute: without noise, in float64.

Shapes: B examples, P numbers of the model.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from clipping.clippers.robust import HuberClipper, NormalisedClipper
from dpopt.estimators import Centred, Dice, Difference, Quantile, Scheduled, Slack, TwoThreshold
from tests.support.dpopt.estimator_runs import (
    SUBJECTS,
    collect,
    flat,
    gradient_of,
    mlp,
    opened,
    rows_of,
    vectors,
)
from tests.support.dpopt.private_runs import losses_of

C, N, HUGE = 0.5, 8, 1e6


def gradients(estimator, *, steps=4, subject="mlp", lr=0.2, clip=C):
    """The gradient of each step of a run on everybody; the model moves by `lr` times it."""
    build, data, losses = SUBJECTS[subject]
    model, found = build(), []
    made = estimator if isinstance(estimator, str) else estimator(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with opened(model, made, clip=clip, num=N) as private:
        for batch in private.batches(data(N), steps=steps):
            collect(private, model, losses, batch)
            private.release()
            found.append(gradient_of(model))
            optimizer.step()
    return found


def means(*, steps=4, lr=0.2, subject="mlp", rate=1.0):
    """Gradients of ordinary training, averaged over time with weights `rate`, from 0."""
    build, data, losses = SUBJECTS[subject]
    model, found, average = build(), [], 0.0
    for _ in range(steps):
        mean = rows_of(model, data(N), losses).mean(0)
        average = average + rate * (mean - average)
        found.append(average)
        nn.utils.vector_to_parameters(flat(model.parameters()) - lr * average, model.parameters())
    return found


def assert_same(one, other, tolerance=1e-9):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


MEANS = {
    "median": lambda _: Centred(HUGE),
    "not tracked": lambda _: Centred(HUGE, tracked=False),
    "coordinates": lambda model: Centred(HUGE, coordinates=sum(p.numel() for p in model.parameters())),
    "two thresholds": lambda _: TwoThreshold(C, HUGE, rate=1.0),
    "quantile": lambda _: Quantile(HUGE, rate=1e-9),
    "schedule": lambda _: Scheduled(HUGE, 10, clip_end=0.1),
    "differences": lambda model: Difference(
        HUGE, lambda: dict(model.named_parameters()), HUGE / 100, restart=3
    ),
    "flat": lambda _: Centred(HUGE, rounds=3, tracked=False),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_thresholds_that_nothing_reaches_give_the_mean(name, subject):
    assert_same(gradients(MEANS[name], subject=subject), means(subject=subject))


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("rule", ["flat", "damped"])
def test_a_centre_without_clipping_is_momentum(rate, rule):
    made = {
        "flat": lambda _: Centred(HUGE, rate=rate),
        # damped by C / (C + mu) inside
        "damped": lambda _: Centred(HUGE, partial(HuberClipper, mu=HUGE * (1 / rate - 1))),
    }[rule]
    assert_same(gradients(made), means(rate=rate))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_momentum_is_that_of_torch(rate):
    """torch starts its average at the first gradient, not at 0: its first is made `rate` times as long."""
    ours = gradients(lambda _: Centred(HUGE, rate=rate))
    model, data = mlp(), vectors(N)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=1 - rate, dampening=1 - rate)
    for t, expected in enumerate(ours):
        optimizer.zero_grad()
        losses_of(model, data).mean().backward()
        for p in model.parameters():
            p.grad *= rate if t == 0 else 1.0
        optimizer.step()
        held = flat([optimizer.state[p]["momentum_buffer"] for p in model.parameters()])
        torch.testing.assert_close(held, expected, rtol=1e-9, atol=1e-12)


def test_huber_of_no_width_is_the_median():
    assert_same(gradients(lambda _: Centred(C, partial(HuberClipper, mu=0.0))), gradients("median:rate=1"))
    assert_same(gradients("huber:mu=0"), gradients("median:rate=1"))


def test_without_a_memory_a_centre_is_plain_clipping():
    assert_same(gradients(lambda _: Centred(C, tracked=False)), gradients("flat"))
    assert not torch.allclose(gradients("median:rate=1")[-1], gradients("flat")[-1])


def test_a_centre_is_clipped_momentum():
    """v <- v + (1 / n) sum_i (x_i - v) min(1, tau / |x_i - v|): Karimireddy, He, Jaggi (2021), algorithm 2."""
    model, data = mlp(), vectors(N)
    v, found = torch.zeros(sum(p.numel() for p in model.parameters())).double(), []
    for _ in range(4):
        x = rows_of(model, data, losses_of)
        v = v + sum((row - v) * min(1.0, C / float((row - v).norm())) for row in x) / N
        found.append(v)
        nn.utils.vector_to_parameters(flat(model.parameters()) - 0.2 * v, model.parameters())
    assert_same(gradients(lambda _: Centred(C)), found)


def test_feedback_without_a_limit_gives_back_what_was_cut_off_one_step_later():
    ours = gradients(lambda _: Dice(C, HUGE), lr=0.0)
    rows = rows_of(mlp(), vectors(N), losses_of)
    clipped = (rows * (C / rows.norm(dim=1, keepdim=True)).clamp_max(1)).mean(0)
    assert_same(ours, [clipped, *[rows.mean(0)] * 3], tolerance=3e-5)


# -- gradients that do not move: a linear loss for each example -----------------------------------------------------


class Linear(nn.Module):
    """The parameters (P,); the loss of an example a (P,) is <w, a>, its gradient a."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(1, size, bias=False).double()

    def forward(self, ones):
        return self.layer(ones)


def run_fixed(points, estimator, steps=1, factor=0.0):
    """The run after each of `steps` on fixed gradients `points` (B, P); with a `factor` it adds factor * w to each."""
    points = torch.as_tensor(points, dtype=torch.float64)
    model = Linear(points.shape[1])
    made = estimator(model) if callable(estimator) else estimator
    with opened(model, made, num=len(points)) as private:
        for batch in private.batches(list(points), steps=steps):

            def losses(model, examples):
                out = model(torch.ones(len(examples), 1).double())
                return (out * torch.stack(list(examples))).sum(1) + factor * out.square().sum(1) / 2

            collect(private, model, losses, batch)
            private.release()
            yield private


@pytest.mark.parametrize("how", ["rounds", "steps"])
def test_normalised_rounds_end_at_the_geometric_median(how):
    points = np.random.default_rng(0).standard_normal((25, 4)) ** 3 + 1
    found = minimize(
        lambda x: np.linalg.norm(points - x, axis=1).sum(),
        points.mean(0),
        jac=lambda x: -((points - x) / np.linalg.norm(points - x, axis=1, keepdims=True)).sum(0),
        tol=1e-12,
    ).x
    rounds, steps = (600, 1) if how == "rounds" else (1, 600)
    estimator = Centred(0.5, partial(NormalisedClipper, nu=1e-6), rounds=rounds)
    for private in run_fixed(points, estimator, steps):
        last = gradient_of(private.model)
    np.testing.assert_allclose(last.numpy(), found, atol=1e-5)
    assert np.linalg.norm(points.mean(0) - found) > 0.1


@pytest.mark.parametrize("restart", [1, 4, 100])
def test_differences_of_quadratic_losses_are_exact(restart):
    """Smooth with L = 2: thresholds of 2 |x - x'| clip no difference, so that each gradient is the whole one."""
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()

    def made(model):
        return Difference(HUGE, lambda: dict(model.named_parameters()), 2.0001, restart)

    for private in run_fixed(points, made, 12, factor=2.0):
        model = private.model
        whole = points.mean(0) + 2.0 * flat(model.parameters())
        torch.testing.assert_close(gradient_of(model), whole, rtol=1e-7, atol=1e-9)
        torch.optim.SGD(model.parameters(), lr=0.2).step()


def test_differences_below_the_smoothness_are_clipped():
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()

    def made(model):
        return Difference(HUGE, lambda: dict(model.named_parameters()), 1.0, restart=100)

    run = run_fixed(points, made, 2, factor=2.0)
    model = next(run).model
    first, before = gradient_of(model), flat(model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.2).step()
    step = flat(model.parameters()) - before
    next(run)
    torch.testing.assert_close(gradient_of(model), first + step)  # not 2 * step


@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["quantile", "slack"])
def test_the_clip_norm_ends_at_the_quantile(kind, target):
    """Of 200 examples with norms exp(x), x normal: within two norms beside the quantile."""
    norms = np.sort(np.exp(np.random.default_rng(1).standard_normal(200)))
    points = np.stack((0.6 * norms, 0.8 * norms), axis=1)
    estimator = (
        Quantile(10.0, target, 0.3) if kind == "quantile" else Slack(10.0, target, 0.3, edges=(0.5, 0.8))
    )
    *_, private = run_fixed(points, estimator, 120)
    reached = private.estimator.level.clip_norm * (1.0 if kind == "quantile" else 0.8)
    at = int(target * 200)
    assert norms[at - 3] <= reached <= norms[at + 3]


def test_the_fractions_are_those_of_the_norms():
    norms = np.exp(np.random.default_rng(2).standard_normal(50))
    points = np.stack((0.6 * norms, 0.8 * norms), axis=1)
    estimator = Slack(1.0, 0.5, 0.2, edges=(0.3, 0.5, 0.9))
    clip_norm, seen = 1.0, []
    for private in run_fixed(points, estimator, 3):
        expected = [np.mean(norms <= edge * clip_norm) for edge in estimator.edges]
        level = private.estimator.level
        assert level.fractions == pytest.approx(expected, abs=1e-4)
        assert level.clip_norm == pytest.approx(clip_norm * math.exp(-0.2 * (expected[-1] - 0.5)), rel=1e-4)
        clip_norm = level.clip_norm
        seen.append(clip_norm)
    assert len({1.0, *seen}) == 4


def test_a_clip_norm_stays_below_its_most():
    points = np.full((4, 2), 100.0)
    for kind in (Quantile, Slack):
        estimator = kind(1.0, rate=2.0, most=3.0)
        *_, private = run_fixed(points, estimator, 5)
        assert private.estimator.level.clip_norm == 3.0 and estimator.level.clip_norm == 1.0


# -- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_a_schedule_begins_and_ends_where_it_says_and_stays(steps):
    estimator = Scheduled(2.0, steps, clip_end=0.25, noise_end=0.5)
    clip_norms = [estimator.stage(t).contribution.clipper.clip_norm for t in range(steps + 3)]
    factors = [estimator.factors(t) for t in range(steps + 3)]
    assert clip_norms[0] == 2.0 and factors[0] == 1.0
    if steps > 1:
        assert clip_norms[steps - 1] == pytest.approx(0.5) and factors[steps - 1] == pytest.approx(0.5)
        assert clip_norms[steps:] == [clip_norms[steps - 1]] * 3
        assert factors[steps:] == [factors[steps - 1]] * 3
    assert sorted(clip_norms, reverse=True) == clip_norms and len(set(factors)) <= 101
    middle = estimator.stage((steps - 1) // 2).contribution.clipper.clip_norm
    assert steps != 7 or middle == pytest.approx(2.0 * math.sqrt(0.25))


def test_a_schedule_of_one_step_ends_where_it_begins_to_end():
    """With one step there is no way to go: it runs at the first clip norm, and what follows at the last."""
    estimator = Scheduled(2.0, 1, clip_end=0.25)
    assert [estimator.stage(t).contribution.clipper.clip_norm for t in range(3)] == pytest.approx(
        [2.0, 0.5, 0.5]
    )


def test_finished_gradients_are_the_users_own():
    """Users scale and clear gradients in place: nothing that an estimator remembers may move with them."""
    for text in ("median", "geometric_median", "two_threshold", "clip21", "diff2", "dice", "quantile"):
        plain = gradients(text)
        build, data, losses = SUBJECTS["mlp"]
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        with opened(model, text, clip=C, num=N) as private:
            for expected, batch in zip(plain, private.batches(data(N), steps=4), strict=True):
                collect(private, model, losses, batch)
                private.release()
                torch.testing.assert_close(gradient_of(model), expected, rtol=1e-12, atol=1e-12)
                optimizer.step()
                for p in model.parameters():
                    p.grad.fill_(1e9)
