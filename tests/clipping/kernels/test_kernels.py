# SPDX-License-Identifier: Apache-2.0
"""The kernels where no CUDA device is: absent, interpreted (in a process of its own) and compiled but not run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipping import Outer, kernels
from clipping.kernels import trust
from clipping.kernels.blocks import EPSILON, RUN_EPSILONS

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no wheel for this platform"
)


def python(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("TRITON")}, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_kernels_agree_with_float64_in_the_interpreter():
    python(
        "-m", "pytest", "tests/clipping/kernels/interpreted.py", "-p", "no:cacheprovider", "--tb=short",
        TRITON_INTERPRET="1", OMP_NUM_THREADS="1",
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for(capability, tmp_path):
    # ptxas comes with triton, so this needs no device; it also sees tf32, lost prefetching and folded sums.
    python(
        "-W", "error", "tests/clipping/kernels/compiled.py", capability,
        PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1",
    )  # fmt: skip


def test_importing_clipping_imports_no_triton():
    code = (
        "import sys, torch; before = set(sys.modules); import clipping, clipping.kernels;"
        "assert not any(name.split('.')[0] == 'triton' for name in set(sys.modules) - before);"
        "assert 'clipping.kernels.ghost' not in sys.modules"
    )
    python("-W", "ignore", "-c", code)


def test_without_triton_nothing_is_available():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from clipping import Outer, kernels;"
        "assert not kernels.available('cpu') and not kernels.available('cuda') and not kernels.trusted('cuda:0');"
        "x = Outer(torch.randn(2, 1, 20, 30), torch.randn(2, 1, 20, 40), torch.Size((30, 40)));"
        "assert x.sq_norm().shape == (2,)"
    )
    python("-W", "ignore", "-c", code)


def test_a_cpu_is_not_served():
    x = torch.randn(1, 1, 20, 4)
    assert not kernels.available("cpu")
    assert not kernels.trusted("cpu")
    assert not kernels.serves(x, x)


class Elsewhere:
    """What `serves` reads of a CUDA tensor."""

    def __init__(self, shape=(2, 1, 64, 32), dtype=torch.bfloat16, device="cuda:0"):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device(device)

    def numel(self):
        return self.shape.numel()


@pytest.fixture
def trusting(monkeypatch):
    monkeypatch.setattr(trust, "trusted", lambda device: True)
    monkeypatch.setattr(trust, "_enabled", [True])


def test_nothing_is_served_before_the_user_asks(monkeypatch):
    monkeypatch.setattr(trust, "trusted", lambda device: True)
    assert not kernels.serves(Elsewhere(), Elsewhere())
    kernels.enable()
    try:
        assert kernels.serves(Elsewhere(), Elsewhere())
    finally:
        kernels.enable(False)
    assert not kernels.serves(Elsewhere(), Elsewhere())


def test_serves_what_the_kernels_take(trusting):
    assert kernels.serves(Elsewhere(), Elsewhere())
    assert kernels.serves(Elsewhere(dtype=torch.float32), Elsewhere(dtype=torch.float32))
    with kernels.without():
        assert not kernels.serves(Elsewhere(), Elsewhere())
    assert kernels.serves(Elsewhere(), Elsewhere())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Elsewhere(dtype=torch.float64), Elsewhere(dtype=torch.float64)),
        (Elsewhere(dtype=torch.float32), Elsewhere()),
        (Elsewhere(device="cuda:1"), Elsewhere()),
        (Elsewhere((0, 1, 64, 32)), Elsewhere((0, 1, 64, 32))),
        (Elsewhere((2, 1, 15, 32)), Elsewhere((2, 1, 15, 32))),
        (Elsewhere((1 << 20, 1 << 12, 64, 32)), Elsewhere((1 << 20, 1 << 12, 64, 32))),
    ],
    ids=["float64", "two dtypes", "two devices", "no examples", "few positions", "too many programs"],
)
def test_serves_nothing_else(trusting, left, right):
    assert not kernels.serves(left, right)


def test_outer_asks_and_uses_what_serves(monkeypatch):
    # The dispatch, with stand-ins for the kernels: which runs for which shape, and what becomes of its answer.
    called = []

    def stand_in(name, answer):
        def kernel(left, right, *rest):
            called.append(name)
            return answer(left, *rest)

        return kernel

    def of_ones(left):
        return torch.ones(left.shape[0])

    tiny_and_huge = torch.tensor([1.0, 1e-36, 1.0]), torch.tensor([1.0, 1e36, 1.0])
    monkeypatch.setattr("clipping.kernels.trust.serves", lambda left, right: True)
    monkeypatch.setattr("clipping.gradients.outer.kernels.serves", lambda left, right: True)
    monkeypatch.setattr(
        "clipping.gradients.outer.kernels.ghost_sq_norm",
        stand_in("ghost", lambda x: (of_ones(x), tiny_and_huge)),
    )
    monkeypatch.setattr("clipping.gradients.outer.kernels.formed_sq_norm", stand_in("formed", of_ones))
    monkeypatch.setattr(
        "clipping.gradients.outer.kernels.weighted_sum",
        stand_in("sum", lambda x, weights, into: into.add_(1)),
    )
    wide = Outer(torch.randn(3, 1, 20, 90), torch.randn(3, 1, 20, 80), torch.Size((90, 80)))
    long = Outer(torch.randn(3, 1, 20, 9), torch.randn(3, 1, 20, 8), torch.Size((9, 8)))
    assert wide.sq_norm().tolist() == [1.0, float("inf"), 1.0]
    assert long.sq_norm().tolist() == [1.0, 1.0, 1.0]
    weights = torch.ones(3)
    assert torch.equal(long.weighted_sum(weights), torch.ones(9, 8))
    into = torch.ones(9, 8)
    assert long.weighted_sum(weights, into) is into
    assert called == ["ghost", "formed", "sum", "sum"]
    assert torch.equal(into, torch.full((9, 8), 2.0))
    # A strided or a float64 total is PyTorch's.
    long.weighted_sum(weights, torch.ones(8, 9).T)
    assert called[4:] == []
    assert not kernels.serves_total(long.left, long.right, torch.ones(9, 8, dtype=torch.float64))


@pytest.mark.gpu
def test_kernels_are_trusted_on_this_device():
    assert kernels.trusted("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("signed", [False, True])
def test_guarantee_one_run_errs_by_less_than_its_bound(dtype, signed):
    # RUN_EPSILONS is an argument about tensor cores: this measures the one at hand.
    made = [torch.rand(1, 1, 64, 1024, device="cuda").to(dtype) for _ in range(2)]
    if signed:
        made = [x - 0.5 for x in made]
    into = torch.zeros(1024, 1024, device="cuda")
    kernels.weighted_sum(made[0], made[1], torch.ones(1, device="cuda"), into)
    exact = (made[0].double().mT @ made[1].double())[0, 0]
    terms = (made[0].double().abs().mT @ made[1].double().abs())[0, 0]
    assert ((into.double() - exact).abs() / terms).max() < RUN_EPSILONS * EPSILON
