# SPDX-License-Identifier: Apache-2.0
"""Scripts in the shape of Opacus' public examples run with their import line changed, to the same effect.

Same epsilon as `opacus.PrivacyEngine`, and the same clipped gradient without noise on the same batch. Opacus
divides by norm + 1e-6, hence the tolerance.
"""

import copy

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import create_accountant
from opacus.layers import DPLSTM
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpopt

# Opacus' own warnings: its generator, torch's changed names, hooks on inputs without gradients, unusual orders.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
]
DELTA = 1e-5


class Mnist(nn.Module):
    """The shape of the MNIST example: two strided convolutions with pooling, two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5, 2, padding=2), nn.Conv2d(4, 8, 4, 2)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class CharLSTM(nn.Module):
    """The shape of the name classification example: characters, a DPLSTM, its last state, a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = DPLSTM(6, 7, batch_first=True)
        self.out = nn.Linear(7, 4)

    def forward(self, x):
        return self.out(self.lstm(self.embedding(x))[0][:, -1])


class MeanOfWords(nn.Module):
    """The shape of the text classification example: the mean of word embeddings, a linear layer."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.emb(x).mean(1))


def images(num):
    return TensorDataset(torch.randn(num, 1, 14, 14), torch.randint(0, 10, (num,)))


def names(num):
    return TensorDataset(torch.randint(0, 20, (num, 9)), torch.randint(0, 4, (num,)))


def texts(num):
    return TensorDataset(torch.randint(0, 50, (num, 12)), torch.randint(0, 3, (num,)))


SUBJECTS = {"mnist": (Mnist, images), "char-lstm": (CharLSTM, names), "embedding": (MeanOfWords, texts)}


def script(
    library, manager, model, data, *, batch_size, epochs=1, physical=None, accountant="prv", **options
):
    """The loop of the examples; only `library` and `manager`, its imports, differ."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    criterion = nn.CrossEntropyLoss()
    engine = library.PrivacyEngine(accountant=accountant)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=batch_size),
        **options,
    )
    model.train()
    for _ in range(epochs):
        with manager(
            data_loader=loader, max_physical_batch_size=physical or 1000, optimizer=optimizer
        ) as new_loader:
            for x, y in new_loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
    return engine, model, optimizer


OURS, THEIRS = (dpopt, dpopt.BatchMemoryManager), (opacus, OpacusManager)


def unwrapped(model):
    return getattr(model, "_module", model)


@pytest.mark.parametrize("options", [
    {"max_grad_norm": 0.3}, {"max_grad_norm": 1e3}, {"max_grad_norm": 0.3, "physical": 5},
    {"max_grad_norm": [0.05] * 20, "clipping": "per_layer"},
], ids=["clipped", "unclipped", "physical", "per_layer"])  # fmt: skip
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_same_clipped_gradient_and_the_same_step(subject, options):
    make, records = SUBJECTS[subject]
    torch.manual_seed(0)
    model, data, results = make(), records(12), []
    if isinstance(options["max_grad_norm"], list):
        options = {**options, "max_grad_norm": options["max_grad_norm"][: len(list(model.parameters()))]}
    for library, manager in (OURS, THEIRS):
        # A rate of one: both draw every record, in order.
        _, trained, _ = script(
            library, manager, copy.deepcopy(model), data, batch_size=12, noise_multiplier=0.0, **options
        )
        results.append(dict(unwrapped(trained).named_parameters()))
    moved = 0.0
    for name, start in model.named_parameters():
        ours, theirs = (found[name] for found in results)
        largest = float(theirs.grad.abs().max())
        print(
            f"{name}: gradients differ by {float((ours.grad - theirs.grad).abs().max()) / largest:.1e} relative"
        )
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * largest)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        moved = max(moved, float((ours - start).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_same_epsilon_after_the_same_script(subject, accountant):
    make, records = SUBJECTS[subject]
    data = records(100)
    ours, theirs = (
        script(
            library, manager, make(), data, batch_size=16, epochs=2, accountant=accountant,
            noise_multiplier=1.1, max_grad_norm=1.0, physical=8,
        )[0].accountant.get_epsilon(delta=DELTA)
        for library, manager in (OURS, THEIRS)
    )  # fmt: skip
    if accountant == "prv":
        assert ours == pytest.approx(theirs, rel=1e-3)
    else:
        assert theirs * 0.9 <= ours <= theirs * 1.001


SETTINGS = [
    (0.8, 1 / 50, 300),
    (1.0, 1 / 100, 1000),
    (2.0, 1 / 10, 100),
    (0.7, 1 / 400, 2000),
    (4.0, 1.0, 20),
]


@pytest.mark.parametrize(("noise", "rate", "steps"), SETTINGS)
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_same_epsilon_for_the_same_settings(accountant, noise, rate, steps):
    if accountant == "prv" and rate == 1:
        pytest.skip("Opacus' PRV takes the logarithm of 1 - rate")
    theirs = create_accountant(accountant)
    theirs.history = [(noise, rate, steps)]
    expected = theirs.get_epsilon(delta=DELTA)
    ours = dpopt.epsilon(
        noise_multiplier=noise, sampling_rate=rate, steps=steps, delta=DELTA, accountant=accountant
    )
    print(f"{accountant} noise {noise} rate {rate:.4f} steps {steps}: ours {ours:.5f}, opacus {expected:.5f}")
    if accountant == "prv":
        assert ours == pytest.approx(expected, rel=1e-3)
    else:
        assert ours <= expected * 1.001


def test_make_private_with_epsilon_finds_a_like_noise_multiplier():
    options = {"target_epsilon": 3.0, "target_delta": DELTA, "epochs": 2, "max_grad_norm": 1.0}
    noises = []
    for library, _ in (OURS, THEIRS):
        model = MeanOfWords()
        engine = library.PrivacyEngine()
        made = engine.make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(texts(200), batch_size=10), **options,
        )  # fmt: skip
        noises.append(engine.noise_multiplier if library is dpopt else made[1].noise_multiplier)
    assert noises[0] == pytest.approx(noises[1], rel=0.02)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_empty_batches_pass_through_every_model(subject):
    make, records = SUBJECTS[subject]
    engine, model, _ = script(
        dpopt, dpopt.BatchMemoryManager, make(), records(25), batch_size=1, accountant="rdp",
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert engine.training.ledger.num_charges == 25
    assert all(p.isfinite().all() for p in model.parameters())
