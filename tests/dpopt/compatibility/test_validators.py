# SPDX-License-Identifier: Apache-2.0
"""ModuleValidator and the three methods of the engine that ask it: what is named, replaced, and left alone."""

import pytest
import torch
import torch.nn.functional as F
from opacus.validators import ModuleValidator as Theirs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from dpopt import MixesExamples, ModuleValidator, PrivacyEngine
from dpopt.opacus import UnsupportedModuleError
from tests.support.dpopt.private_runs import examples, familiar, mlp, train


class Residual(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU())
        self.again = self.body[1]  # one layer under two names
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.pool(self.again(self.body(x))).flatten(1))


def test_batch_norm_is_named_where_it_stands_and_group_norm_takes_its_place():
    model = Residual()
    errors = ModuleValidator.validate(model)
    assert len(errors) == 1 and "'body.1' (BatchNorm2d)" in str(errors[0])
    assert "dpopt.ModuleValidator.fix(model)" in str(errors[0])
    assert not ModuleValidator.is_valid(model) and not PrivacyEngine.is_compatible(module=model)
    for refuse in (
        lambda: ModuleValidator.validate(model, strict=True),
        lambda: PrivacyEngine.validate(module=model),
    ):
        with pytest.raises(UnsupportedModuleError, match=r"body.1"):
            refuse()
    fixed = ModuleValidator.fix(model)
    assert isinstance(fixed.body[1], nn.GroupNorm) and fixed.again is fixed.body[1]
    assert isinstance(model.body[1], nn.BatchNorm2d)  # the given one stays
    torch.testing.assert_close(fixed.head.weight, model.head.weight)
    assert ModuleValidator.is_valid(fixed) and ModuleValidator.validate(fixed, strict=True) == []
    # and trains
    data = TensorDataset(torch.randn(8, 3, 5, 5), torch.randint(0, 3, (8,)))
    engine, fixed, optimizer, loader = familiar(fixed, data, noise=1.0)
    train(fixed, optimizer, loader)
    assert engine.training.ledger.num_charges == 1


@pytest.mark.parametrize("channels", [1, 6, 24, 32, 48, 7])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (4, 4)), (nn.BatchNorm3d, (2, 2, 2))]
)
def test_the_replacements_are_those_of_opacus(channels, kind, shape):
    x = torch.randn(3, channels, *shape)
    for options in ({}, {"num_groups": 1}, {"replace_bn_with_in": True}):
        model = nn.Sequential(kind(channels))
        ours, theirs = ModuleValidator.fix(model, **options)[0], Theirs.fix(model, **options)[0]
        assert type(ours) is type(theirs) and getattr(ours, "num_groups", 0) == getattr(
            theirs, "num_groups", 0
        )
        if "replace_bn_with_in" not in options:
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(ours(x), theirs(x))


def test_what_fix_leaves_alone_and_what_it_keeps():
    frozen = nn.BatchNorm2d(8).requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), frozen, nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)).to(
        torch.float64
    )
    fixed = ModuleValidator.fix(model)
    assert isinstance(fixed[1], nn.BatchNorm2d) and isinstance(fixed[2], nn.LSTM)
    assert isinstance(fixed[3], nn.MultiheadAttention)
    assert "model.eval() on a frozen" in str(ModuleValidator.validate(fixed)[0])
    fixed[1].eval()
    assert ModuleValidator.is_valid(fixed)
    root = ModuleValidator.fix(nn.BatchNorm2d(6).to(torch.float64).eval())
    assert isinstance(root, nn.GroupNorm) and root.weight.dtype == torch.float64 and not root.training
    bare = ModuleValidator.fix(
        nn.Sequential(nn.BatchNorm1d(6, affine=False))
    )  # no parameters, and mixes all the same
    assert isinstance(bare[0], nn.GroupNorm) and bare[0].weight is None
    tracking = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True, momentum=0.3))
    assert not ModuleValidator.is_valid(tracking)
    fixed = ModuleValidator.fix_and_validate(tracking)
    assert fixed[0].running_mean is None and fixed[0].momentum == 0.3
    assert torch.equal(fixed[0].weight, tracking[0].weight)
    with pytest.raises(ValueError, match="expected replace_bn_with_in or num_groups; got both"):
        ModuleValidator.fix(model, replace_bn_with_in=True, num_groups=2)
    with pytest.raises(ValueError, match="leave replace_bn_with_in out"):
        ModuleValidator.fix(nn.Sequential(nn.SyncBatchNorm(4)), replace_bn_with_in=True)


def test_a_compatible_module_is_a_copy_and_what_no_replacement_is_known_for_is_refused():
    model = mlp()
    found = PrivacyEngine.get_compatible_module(model)
    assert found is not model and found[0].weight is not model[0].weight
    assert torch.equal(found[0].weight, model[0].weight)
    half = nn.Sequential(nn.Linear(2, 2).to(torch.float16))
    with pytest.raises(MixesExamples, match="float16"):
        PrivacyEngine.get_compatible_module(half)
    with pytest.raises(ValueError, match="expected a model with trainable parameters"):
        ModuleValidator.validate(nn.Linear(2, 2).requires_grad_(False), strict=True)


def test_the_engine_refuses_a_model_that_the_validator_names():
    # 64 channels in 32 groups: a group of one value has no variance in a draw of one row.
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 3))
    with pytest.raises(UnsupportedModuleError, match="BatchNorm1d"):
        familiar(model)
    engine = PrivacyEngine(accountant="rdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = engine.get_compatible_module(model)
    loader = DataLoader(examples(8), batch_size=4)
    # An optimizer made before the fix has the old model's parameters.
    assert not engine.is_compatible(module=model, optimizer=optimizer, data_loader=loader)
    with pytest.raises(ValueError, match=r"build the optimizer from its parameters"):
        engine.validate(module=model, optimizer=optimizer, data_loader=loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert engine.is_compatible(module=model, optimizer=optimizer, data_loader=loader)
    weighted = DataLoader(examples(8), batch_size=4, sampler=WeightedRandomSampler([1.0] * 8, 8))
    assert not engine.is_compatible(module=model, optimizer=None, data_loader=weighted)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
