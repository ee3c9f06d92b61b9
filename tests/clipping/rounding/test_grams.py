# SPDX-License-Identifier: Apache-2.0
"""The Gram matrices of a layer's input are computed once for all layers that read it, and never for another one."""

import pytest
import torch
from torch import nn

from clipping import Contribution, Costs, FlatClipper, Outer
from clipping.collectors.one_pass import Clipping, Sums
from clipping.recording.tape import Tape
from clipping.rounding import grams as grams
from clipping.rounding.grams import Workspace

B, T, D = 3, 70, 12


@pytest.fixture
def computed(monkeypatch):
    seen = []
    original = grams._gram

    def counted(values):
        seen.append(values.shape)
        return original(values)

    monkeypatch.setattr(grams, "_gram", counted)
    return seen


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, 3 * T) for _ in range(3))
        self.out = nn.Linear(3 * T, 3 * T)

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).mT / 30).softmax(-1)
        return self.out(weights @ self.value(x))


def test_queries_keys_and_values_share_one_gram(computed):
    model = Attention()
    wide = 3 * T  # so wide that the norm goes through the Gram matrices
    for layer in (model.query, model.key, model.value):
        layer.weight = nn.Parameter(torch.randn(wide, 4 * T) / 30)
    names = tuple(name for name, _ in model.named_parameters())
    sums = Sums(Contribution(FlatClipper(1.0)), (names,), costs=Costs(keep_memory=0))
    with Tape(model, lambda idle: Clipping(sums, idle, lambda _: None)):
        model(torch.randn(B, T, 4 * T)).square().sum().backward()
    assert sums.choices["query.weight"].path == "gram"
    assert len(computed) == 2  # one for the input of the three, one for the input of the last


def test_another_input_and_one_changed_in_place_get_their_own(computed):
    space = Workspace()
    values = torch.randn(B, 1, T, D)
    first = space.gram(values)
    assert space.gram(values.view(B, 1, T, D)) is first and len(computed) == 1
    values.mul_(2)
    second = space.gram(values)
    torch.testing.assert_close(second.trace, 4 * first.trace)
    for other in (values[..., : D // 2], values.clone(), values.double()):
        assert space.gram(other) is not second
    assert len(computed) == 5
    space.forget()
    assert space.gram(values) is not second


def test_a_gram_beyond_the_cap_is_not_kept(computed, monkeypatch):
    monkeypatch.setattr(grams, "CHUNK_ELEMENTS", B * T * T - 1)
    assert Workspace().gram(torch.randn(B, 1, T, D)) is None and not computed


@pytest.mark.parametrize("cap", [50, 1000, 20_000])
@pytest.mark.parametrize("positions", [2, 3, 63, 64, 65, 127, 128, 131])
def test_blocks_give_the_norm_whatever_their_size(cap, positions, monkeypatch):
    monkeypatch.setattr(grams, "CHUNK_ELEMENTS", cap)
    left, right = torch.randn(2, 2, positions, 400).double(), torch.randn(2, 2, positions, 300).double()
    made = Outer(left, right, torch.Size((800, 300)))
    expected = made.dense().flatten(1).square().sum(1)
    for space in (None, Workspace()):
        torch.testing.assert_close(made.sq_norm(space), expected, rtol=1e-9, atol=0)


def test_scratch_is_used_again_and_grows():
    space = Workspace()
    scale = torch.tensor([2.0, 3.0]).view(2, 1)
    first = space.scaled(torch.ones(2, 5), scale)
    assert first.tolist() == [[2.0] * 5, [3.0] * 5]
    again = space.scaled(torch.full((2, 4), 2.0, dtype=torch.bfloat16), scale)
    assert again.data_ptr() == first.data_ptr() and again.dtype == torch.float32
    assert again.tolist() == [[4.0] * 4, [6.0] * 4]
    assert space.scaled(torch.ones(2, 50), scale).shape == (2, 50)
