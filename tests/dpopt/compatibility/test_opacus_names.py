# SPDX-License-Identifier: Apache-2.0
"""Every name that scripts import from Opacus is in dpopt.opacus, or says why not; and the page tells of each."""

from pathlib import Path

import pytest
import torch
from torch import nn

import dpopt
import dpopt.opacus

PAGE = Path(__file__).parents[3] / "docs" / "migration.md"


def test_names_are_those_of_dpopt():
    for name in dpopt.opacus.__all__:
        assert getattr(dpopt.opacus, name) is getattr(dpopt, name, getattr(dpopt.opacus, name))
    for name in (
        "PrivacyEngine",
        "BatchMemoryManager",
        "ModuleValidator",
        "DPDataLoader",
        "StepNoise",
        "LambdaGradClip",
    ):
        assert name in dpopt.__all__ and name in dpopt.opacus.__all__
    with pytest.raises(AttributeError):
        _ = dpopt.opacus.nonsense
    assert not hasattr(dpopt.opacus, "nonsense")


@pytest.mark.parametrize("name", sorted(dpopt.opacus._REFUSED))
def test_what_is_not_offered_can_be_imported_and_says_why_when_it_is_used(name):
    found = {}
    exec(f"from dpopt.opacus import {name} as found", found)
    found = found["found"]
    for use in (lambda: found(1, a=2), lambda: found.from_data_loader):
        with pytest.raises(RuntimeError, match=r"docs/migration\.md tells more"):
            use()
    with pytest.raises(RuntimeError, match=f"expected a script without {name}; got one that uses it; "):

        class Mine(found):
            pass

    assert not isinstance(nn.Linear(1, 1), found) and not hasattr(found, "__len__")


@pytest.mark.parametrize("name", sorted({*dpopt.opacus.__all__, *dpopt.opacus._REFUSED}))
def test_the_page_of_migration_tells_of_every_name(name):
    assert f"`{name}`" in PAGE.read_text()


@pytest.mark.parametrize(("ours", "kind"), [("DPLSTM", nn.LSTM), ("DPGRU", nn.GRU), ("DPRNN", nn.RNN)])
def test_recurrent_layers_of_opacus_are_torchs_own(ours, kind):
    from opacus import layers

    assert getattr(dpopt.opacus, ours) is kind
    torch.manual_seed(0)
    theirs = getattr(layers, ours)(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    mine = getattr(dpopt.opacus, ours)(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(mine(x)[0], theirs(x)[0])


def test_attention_takes_the_same_arguments():
    attention = dpopt.opacus.DPMultiheadAttention(8, 2, dropout=0.0, bias=True, batch_first=True)
    assert isinstance(attention, nn.MultiheadAttention)
