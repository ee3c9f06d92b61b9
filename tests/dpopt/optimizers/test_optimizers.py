# SPDX-License-Identifier: Apache-2.0
"""After the noise: AdamW without the noise's variance, averages of iterates, and private momentum."""

import ast
import copy
import io
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dpopt.optimizers
from dpopt.optimizers import AdamBC, Averaged, exponential, noise_std_of, uniform

SMALL = 1e-12


def weights(*shapes, seed=0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=source, dtype=dtype)) for shape in shapes]


def descend(optimizer, params, steps, seed=1, before=lambda t: None):
    """Steps on made-up gradients that are the same for the same seed; the last parameter misses each third."""
    source = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=source, dtype=p.dtype) * (1 + p.detach().abs())
        if t % 3 == 0 and len(params) > 1:
            params[-1].grad = None
        before(t)
        optimizer.step()


def second_moment(optimizer, p):
    """What AdamBC takes for the mean square of the signal, before the floor."""
    state = optimizer.state[p]
    whole = 1 - optimizer.param_groups[0]["betas"][1] ** state["step"]
    return (state["exp_avg_sq"] - state["noise_var"]) / whole


# AdamBC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "eps": 1e-3, "betas": (0.8, 0.95), "lr": 0.1}])
def test_guarantee_without_noise_it_is_adamw(options, dtype):
    ours, theirs = weights((3, 4), (5,), dtype=dtype), weights((3, 4), (5,), dtype=dtype)
    descend(AdamBC(ours, noise_std=0.0, **options), ours, 40)
    descend(torch.optim.AdamW(theirs, **options), theirs, 40)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own, other)
        assert not torch.equal(own, weights((3, 4), (5,), dtype=dtype)[own.dim() == 1])


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 10)), min_size=1, max_size=12),
    beta2=st.floats(0, 0.9999),
)
def test_guarantee_the_noise_averages_out_of_the_second_moment(steps, beta2):
    # Noise of +s or -s has the stated mean and variance; over a sequence and its mirror the mean is exact.
    found = []
    for sign in (1, -1):
        (p,) = weights((1,))
        now = {}
        optimizer = AdamBC([p], lr=0.0, betas=(0.9, beta2), noise_std=lambda now=now: now["std"])
        for t, (g, std) in enumerate(steps):
            now["std"] = std
            p.grad = torch.full((1,), g + sign * (-1) ** t * std, dtype=torch.float64)
            optimizer.step()
        found.append(second_moment(optimizer, p).item())
    last = len(steps) - 1
    shares = [(1 - beta2) * beta2 ** (last - i) / (1 - beta2 ** len(steps)) for i in range(len(steps))]
    signal = math.fsum(w * g * g for w, (g, _) in zip(shares, steps, strict=True))
    assert sum(found) / 2 == pytest.approx(signal, rel=1e-9, abs=1e-9)


def test_the_second_moment_is_that_of_a_random_signal_under_louder_noise():
    size, steps, beta2, tau, std = 4000, 400, 0.99, 0.3, 2.0
    means = torch.linspace(-1, 1, size, dtype=torch.float64)
    source = torch.Generator().manual_seed(3)
    (p,) = weights((size,))
    optimizer = AdamBC([p], lr=0.0, betas=(0.9, beta2), noise_std=std)
    for _ in range(steps):
        draws = torch.randn(2, size, generator=source, dtype=torch.float64)
        p.grad = means + tau * draws[0] + std * draws[1]
        optimizer.step()
    error = second_moment(optimizer, p) - (means**2 + tau**2)
    # Each entry is a weighted mean of squares of normals; their weights are nearly stationary.
    share = (1 - beta2) / (1 + beta2)
    loud = tau**2 + std**2
    deviation = (share * (2 * loud**2 + 4 * means**2 * loud)).sqrt()
    assert abs((error / deviation).mean()) < 5 / math.sqrt(size)
    assert 0.9 < (error / deviation).std() < 1.1
    plain = optimizer.state[p]["exp_avg_sq"] / (1 - beta2**steps)
    assert (plain - means**2 - tau**2).mean() > 0.9 * std**2


def test_the_default_floor_is_the_deviation_of_the_noise_alone():
    size, beta2 = 20000, 0.9
    stds = [1.0, 3.0, 0.5, 2.0, 1.0, 1.0]
    source = torch.Generator().manual_seed(4)
    (p,) = weights((size,))
    queue = iter(stds)
    optimizer = AdamBC([p], lr=0.0, betas=(0.9, beta2), noise_std=lambda: next(queue))
    for std in stds:
        p.grad = std * torch.randn(size, generator=source, dtype=torch.float64)
        optimizer.step()
        floor = math.sqrt(2 * optimizer.state[p]["noise_sq"]) / (1 - beta2 ** optimizer.state[p]["step"])
        left = second_moment(optimizer, p)
        assert left.std().item() == pytest.approx(floor, rel=0.06)
        assert abs(left.mean().item()) < 5 * floor / math.sqrt(size)


@pytest.mark.parametrize("floor", [None, 0.25])
def test_a_step_is_the_formula(floor):
    lr, beta1, beta2, eps, decay, stds = 0.1, 0.8, 0.9, 1e-3, 0.2, [0.5, 2.0, 1.0]
    (p,) = weights((50,))
    expected = p.detach().clone()
    queue = iter(stds)
    optimizer = AdamBC(
        [p], lr, (beta1, beta2), eps, decay, noise_std=lambda: next(queue), floor=floor
    )  # the positions of torch's AdamW
    grads, floored = [], 0
    for t, _ in enumerate(stds, 1):
        grads.append(torch.randn(50, dtype=torch.float64))
        p.grad = grads[-1]
        optimizer.step()
        shares1 = [(1 - beta1) * beta1 ** (t - i) / (1 - beta1**t) for i in range(1, t + 1)]
        shares2 = [(1 - beta2) * beta2 ** (t - i) / (1 - beta2**t) for i in range(1, t + 1)]
        mean = sum(w * g for w, g in zip(shares1, grads, strict=True))
        signal = sum(w * (g**2 - s**2) for w, g, s in zip(shares2, grads, stds, strict=False))
        least = floor
        if least is None:
            least = math.sqrt(2 * sum(w**2 * s**4 for w, s in zip(shares2, stds, strict=False)))
        floored += int((signal < least).sum())
        expected = expected * (1 - lr * decay) - lr * mean / (signal.clamp(min=least).sqrt() + eps)
        torch.testing.assert_close(p.detach(), expected, rtol=SMALL, atol=SMALL)
    assert 0 < floored < 150


def test_each_parameter_has_its_own_noise():
    loud, quiet = weights((4,), (4,))
    optimizer = AdamBC([loud, quiet], noise_std={loud: 2.0, quiet: 0.5})
    descend(optimizer, [loud, quiet], 5)
    assert optimizer.state[loud]["noise_var"] == pytest.approx(4.0 * (1 - 0.999**5))
    assert optimizer.state[quiet]["noise_var"] == pytest.approx(0.25 * (1 - 0.999**3))
    alone = weights((4,), (4,))
    descend(AdamBC(alone, noise_std={alone[0]: 2.0, alone[1]: 2.0}), alone, 5)
    assert torch.equal(alone[0], loud)
    assert not torch.equal(alone[1], quiet)


class Run:
    """What AdamBC needs of a private run."""

    def __init__(self, model):
        self.model = model
        self.noise_stds = {name: 1.0 for name, p in model.named_parameters() if p.requires_grad}


def test_the_noise_is_read_from_a_run_at_every_step():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    run = Run(model)
    optimizer = AdamBC(model.parameters(), betas=(0.9, 0.5), noise_std=noise_std_of(run))

    def clip_norms_change(t):
        run.noise_stds = {name: t + len(name) for name in run.noise_stds}

    descend(optimizer, [*model.parameters()], 4, before=clip_norms_change)
    for name, p in model.named_parameters():
        steps = [1, 2] if p is model[1].bias else [0, 1, 2, 3]
        wanted = sum(0.5 * 0.5 ** (len(steps) - 1 - i) * (t + len(name)) ** 2 for i, t in enumerate(steps))
        assert optimizer.state[p]["noise_var"] == pytest.approx(wanted)


def test_an_engine_tells_the_noise_of_a_run_that_begins_later():
    class Engine:
        run = None

        @property
        def training(self):
            if self.run is None:
                raise RuntimeError("call make_private first")
            return self.run

    model, engine = nn.Linear(2, 1), Engine()
    optimizer = AdamBC(model.parameters(), noise_std=noise_std_of(engine))
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="make_private"):
        optimizer.step()
    engine.run = Run(model)
    optimizer.step()
    assert optimizer.state[model.weight]["noise_var"] == pytest.approx(1e-3)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_number_that_is_no_noise_is_refused_before_a_parameter_moves(std):
    with pytest.raises(ValueError, match="expected a noise_std >= 0"):
        AdamBC(weights((2,)), noise_std=std)
    params = weights((2,), (2,))
    before = copy.deepcopy(params)
    optimizer = AdamBC(
        [{"params": params[:1]}, {"params": params[1:]}],
        noise_std=lambda: {params[0]: 1.0, params[1]: std},
    )
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="expected a noise_std >= 0"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not optimizer.state


def test_a_parameter_without_a_stated_noise_is_refused():
    params = weights((2,), (3,))
    optimizer = AdamBC(params, noise_std={params[0]: 1.0})
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()  # the other has no gradient
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(ValueError, match=r"one of shape \(3,\)"):
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"eps": math.nan}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"floor": -1e-9}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected a"):
        AdamBC(weights((2,)), noise_std=1.0, **options)
    optimizer = AdamBC(weights((2,)), noise_std=1.0)
    with pytest.raises(ValueError, match="expected a"):
        optimizer.add_param_group({"params": weights((3,)), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_too_coarse_for_the_difference_are_refused(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        AdamBC(weights((2,), dtype=dtype), noise_std=1.0)


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense"):
        AdamBC(layer.parameters(), noise_std=1.0).step()


def test_a_saved_optimizer_goes_on_as_if_never_stopped():
    straight, resumed = weights((3,), (2,)), weights((3,), (2,))
    first = AdamBC(straight, noise_std=0.7, lr=0.05)
    descend(first, straight, 6)
    descend(first, straight, 6, seed=2)

    second = AdamBC(resumed, noise_std=0.7, lr=0.05)
    descend(second, resumed, 6)
    stored = io.BytesIO()
    torch.save(second.state_dict(), stored)
    stored.seek(0)
    third = AdamBC(resumed, noise_std=0.7)
    third.load_state_dict(torch.load(stored, weights_only=True))
    descend(third, resumed, 6, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_it_is_an_ordinary_optimizer():
    params = weights((3,), (2,))
    optimizer = AdamBC([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1, noise_std=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    assert optimizer.step(lambda: 3.5) == 3.5
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    assert set(optimizer.state_dict()) == set(torch.optim.AdamW(params).state_dict())


def test_a_copy_steps_as_the_original():
    params = weights((3,), (2,))
    optimizer = AdamBC(params, noise_std={params[0]: 2.0, params[1]: 1.0})
    descend(optimizer, params, 4)
    twin, copied = copy.deepcopy((optimizer, params))
    descend(optimizer, params, 4, seed=2)
    assert not torch.equal(copied[0], params[0])
    descend(twin, copied, 4, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, copied, strict=True))


def test_the_state_of_another_optimizer_is_refused():
    params = weights((3,), (2,))
    other = torch.optim.AdamW(params)
    descend(other, params, 2)
    with pytest.raises(ValueError, match="state of an AdamBC"):
        AdamBC(params, noise_std=1.0).load_state_dict(other.state_dict())


# Averages ----------------------------------------------------------------------------------------


def walk(model, averaged, steps, seed=5):
    """Random iterates of the first parameter, the initial one before them."""
    source = torch.Generator().manual_seed(seed)
    seen = [model.weight.detach().clone()]
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn(model.weight.shape, generator=source, dtype=model.weight.dtype))
        seen.append(model.weight.detach().clone())
        averaged.update()
    return seen


@pytest.mark.parametrize("rule", [exponential(), exponential(0.5), exponential(0.0), uniform(), uniform(7)])
def test_guarantee_the_average_is_the_stated_combination(rule):
    model = nn.Linear(3, 2).double()
    averaged = Averaged(model, rule)
    seen = walk(model, averaged, 20)
    shares = [1.0]
    for t in range(20):
        shares = [share * rule(t) for share in shares] + [1 - rule(t)]
    assert math.fsum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    wanted = sum(share * w for share, w in zip(shares, seen, strict=True))
    target = copy.deepcopy(model)
    averaged.copy_to(target)
    torch.testing.assert_close(target.weight.detach(), wanted, rtol=SMALL, atol=SMALL)


def test_the_rules_are_as_stated():
    assert [exponential(0.5)(t) for t in (0, 1, 7, 8, 100)] == pytest.approx(
        [1 / 10, 2 / 11, 8 / 17, 0.5, 0.5]
    )
    model = nn.Linear(3, 2).double()
    averaged = Averaged(model, uniform(4))
    seen = walk(model, averaged, 10)
    with averaged.applied():
        torch.testing.assert_close(
            model.weight.detach(), torch.stack(seen[5:]).mean(0), rtol=SMALL, atol=SMALL
        )
    early = Averaged(model, uniform(100))
    latest = walk(model, early, 3)[-1]
    with early.applied():
        assert torch.equal(model.weight, latest)


def test_an_average_of_independent_iterates_has_less_noise():
    model = nn.Linear(100, 200, bias=False).double()
    averaged = Averaged(model, exponential(0.9))
    for _ in range(200):
        nn.init.normal_(model.weight)
        averaged.update()
    with averaged.applied():
        assert model.weight.var().item() == pytest.approx(0.1 / 1.9, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_guarantee_applied_restores_the_weights(dtype):
    model = nn.Linear(3, 2).to(dtype)
    averaged = Averaged(model, exponential(0.9))
    walk(model, averaged, 5)
    before, owned = model.weight.detach().clone(), model.weight
    with averaged.applied():
        assert not torch.equal(model.weight, before)
        assert model.weight is owned
        assert model.weight.dtype == dtype
    assert torch.equal(model.weight, before)
    with pytest.raises(KeyError), averaged.applied():
        raise KeyError
    assert torch.equal(model.weight, before)
    averaged.update()  # the failed block left nothing behind


def test_bfloat16_weights_have_a_float32_average():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.zeros_(model.weight)
    averaged = Averaged(model, lambda t: 0.999)
    nn.init.ones_(model.weight)
    for _ in range(2000):
        averaged.update()
    assert averaged.state_dict()["average"]["weight"].item() == pytest.approx(1 - 0.999**2000, rel=1e-4)


def test_blocks_do_not_nest_and_averages_are_not_averaged():
    model = nn.Linear(2, 1)
    averaged = Averaged(model)
    with averaged.applied():
        with pytest.raises(RuntimeError, match="inside applied"):
            averaged.update()
        with pytest.raises(RuntimeError, match="one inside another"), averaged.applied():
            pass
    assert averaged.updates == 0


def test_only_trained_parameters_are_held_and_others_are_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    averaged = Averaged(model)
    assert set(averaged.state_dict()["average"]) == {"1.weight", "1.bias"}
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.bias"):
        averaged.update()
    with pytest.raises(ValueError, match="same architecture"):
        averaged.copy_to(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"1\.weight"):
        averaged.load_state_dict({"updates": 1, "average": {"1.bias": torch.zeros(1)}})


def test_a_saved_average_goes_on_as_if_never_stopped():
    model = nn.Linear(3, 2)
    straight = Averaged(model)
    walk(model, straight, 5)
    saved = straight.state_dict()
    before = saved["average"]["weight"].clone()
    walk(model, Averaged(model), 1)
    straight.update()
    assert torch.equal(saved["average"]["weight"], before)
    stored = io.BytesIO()
    torch.save(straight.state_dict(), stored)
    stored.seek(0)
    resumed = Averaged(model)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    walk(model, straight, 1)
    resumed.update()
    assert resumed.updates == straight.updates == 7
    for name, value in straight.state_dict()["average"].items():
        assert torch.equal(resumed.state_dict()["average"][name], value)


@pytest.mark.parametrize("make", [lambda: exponential(1.0), lambda: exponential(-0.1), lambda: uniform(-1)])
def test_rules_that_average_nothing_are_refused(make):
    with pytest.raises(ValueError, match="expected a"):
        make()


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_rule_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        Averaged(nn.Linear(1, 1), lambda t: share).update()


# Momentum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_private_momentum_is_torch_sgd_with_dampening(beta):
    size, steps, std, mean = 40000, 120, 3.0, 0.25
    source = torch.Generator().manual_seed(6)
    p = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=1.0, momentum=beta, dampening=beta)
    direction = torch.zeros(())
    for _ in range(steps):
        p.grad = mean + std * torch.randn(size, generator=source, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        direction = before - p.detach()
    kappa = (1 - beta) / (1 + beta)
    assert direction.var().item() == pytest.approx(kappa * std**2, rel=0.04)
    assert abs(direction.mean().item() - mean) < 5 * math.sqrt(kappa / size) * std


# Post-processing ---------------------------------------------------------------------------------


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_guarantee_optimizers_cannot_see_data():
    sources = sorted(Path(dpopt.optimizers.__file__).parent.glob("*.py"))
    found = set(itertools.chain.from_iterable(imports(path.read_text()) for path in sources))
    assert len(sources) >= 3
    assert {"torch", "dpopt.optimizers.adam_bc"} <= found
    ours = {name for name in found if name.partition(".")[0] in {"dpopt", "clipping", "accountants"}}
    assert all(name.startswith("dpopt.optimizers.") for name in ours)
