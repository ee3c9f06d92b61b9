# SPDX-License-Identifier: Apache-2.0
"""Small subjects for both doors, and the oracle of the clipped sum: one backward for each example."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpopt import FlatClipper, GaussianMechanism, PoissonSampling, PrivacyEngine, PrivateTraining

D, K = 4, 3
EVERYBODY = 1.0
NOBODY = 1e-12


def mlp(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, K)).to(dtype)


def examples(num, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    inputs = 3 * torch.randn(num, D, generator=generator, dtype=dtype)
    return TensorDataset(inputs, torch.randint(0, K, (num,), generator=generator))


def explicit(model, *, rate=EVERYBODY, expected=8.0, noise=0.0, clip=1.0, **options):
    return PrivateTraining(
        model,
        clipper=options.pop("clipper", FlatClipper(clip)),
        mechanism=options.pop("mechanism", GaussianMechanism(noise)),
        sampling=PoissonSampling(rate, expected),
        accountant_name=options.pop("accountant_name", "rdp"),
        **options,
    )


def losses_of(model, batch):
    inputs, labels = (torch.stack(column) for column in zip(*batch, strict=True))
    return F.cross_entropy(model(inputs), labels, reduction="none")


def familiar(model=None, dataset=None, *, batch_size=8, noise=0.0, engine=None, optimizer=None, **options):
    """(engine, model, optimizer, loader) after make_private."""
    model = mlp() if model is None else model
    dataset = examples(8) if dataset is None else dataset
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    loader_options = {
        k: options.pop(k) for k in ("num_workers", "collate_fn", "persistent_workers") if k in options
    }
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, **loader_options)
    engine = PrivacyEngine(accountant="rdp") if engine is None else engine
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=options.pop("max_grad_norm", 1.0),
        **options,
    )
    assert len(made) == 3
    return engine, *made


def train(model, optimizer, loader, loss=F.cross_entropy, parts=1):
    for inputs, labels in loader:
        optimizer.zero_grad()
        for x, y in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
            loss(model(x), y).backward()
        optimizer.step()


def clipped_mean(model, dataset, *, clip=1.0, expected=8.0):
    """By name: sum over examples of their clipped gradients / expected, from one backward for each example."""
    model = copy.deepcopy(model)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, label in dataset:
        model.zero_grad()
        F.cross_entropy(model(inputs[None]), label[None]).backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        for name, p in model.named_parameters():
            total[name] += p.grad * min(1.0, clip / norm.item())
    return {name: value / expected for name, value in total.items()}


def assert_gradients(model, expected, *, tolerance=1e-5):
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=tolerance, atol=tolerance)


def leftovers(model, optimizer=None):
    """Every hook on the model, its parameters and the optimizer, every odd attribute, every gradient."""
    ordinary = {*vars(nn.Module()), "in_features", "out_features"}
    found = []
    for module in model.modules():
        found += [*module._forward_pre_hooks, *module._forward_hooks, *module._backward_hooks]
        found += [name for name in vars(module) if name not in ordinary]
    for p in model.parameters():
        found += [*(p._backward_hooks or ()), *vars(p)]
        found += [] if p.grad is None else [p.grad]
    if optimizer is not None:
        options = {"fused": True} if optimizer.defaults.get("fused") else {}
        ordinary = vars(type(optimizer)([nn.Parameter(torch.zeros(1))], lr=0.1, **options))
        found += [
            name for name in vars(optimizer) if name not in {*ordinary, "step", "_opt_called"}
        ]  # torch's schedulers
        found += [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    return found
