# SPDX-License-Identifier: Apache-2.0
"""Attacks on the attribution of rows to examples: the order of the rows changes at a draw that is not probed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tests.support.dpopt.private_runs import familiar

NUM, K, CLIP = 5, 4, 0.1


class Folded(nn.Module):
    """K rows for each example folded into the batch, rearranged by `there`, and by `back` afterwards, from call 3 on."""

    def __init__(self, there, back):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 3)
        self.there, self.back, self.calls = there, back, 0

    def forward(self, x):
        self.calls += 1
        there, back = (self.there, self.back) if self.calls >= 3 else (nn.Identity(), nn.Identity())
        rows = torch.tanh(self.inner(there(x.reshape(-1, 3))))
        return self.outer(back(rows).view(len(x), -1, 6).mean(1))


def _transposed(outside):
    return lambda rows: rows.view(outside, -1, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)


ORDERS = {
    "transposed": (_transposed(NUM), _transposed(K)),
    "flipped": (lambda rows: rows.flip(0), lambda rows: rows.flip(0)),
    "rolled": (lambda rows: rows.roll(3, 0), lambda rows: rows.roll(-3, 0)),
    "parts exchanged": (
        lambda rows: torch.cat([rows[3:], rows[:3]]),
        lambda rows: torch.cat([rows[-3:], rows[:-3]]),
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_attack_by_another_order_of_rows_at_a_later_draw_is_attributed(name):
    torch.manual_seed(0)
    x = torch.randn(NUM, K, 3) * torch.arange(1.0, NUM + 1).view(-1, 1, 1)
    y = torch.arange(NUM) % 3
    model = Folded(*ORDERS[name])
    known = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, model, optimizer, loader = familiar(
        model, TensorDataset(x, y), batch_size=NUM, optimizer=optimizer, max_grad_norm=CLIP
    )
    for _ in range(4):
        for a, b in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
    found = torch.cat([p.grad.flatten() for p in model.parameters()]) * NUM
    engine.detach()
    expected = torch.zeros_like(found)
    for i in range(NUM):
        grads = torch.autograd.grad(
            F.cross_entropy(known(x[i : i + 1]), y[i : i + 1]), list(known.parameters())
        )
        grad = torch.cat([g.flatten() for g in grads])
        known.calls = 0
        expected += grad * min(1.0, CLIP / float(grad.norm()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
