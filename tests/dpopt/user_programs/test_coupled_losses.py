# SPDX-License-Identifier: Apache-2.0
"""Scalar losses in the familiar door: one record moves the clipped sum by at most the clip norm, or the loss is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dpopt import MixesExamples, causal_lm_losses
from tests.support.dpopt.private_runs import assert_gradients, clipped_mean, examples, familiar, mlp

V = 7
ce = F.cross_entropy


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, 6), nn.Linear(6, V)

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))


def tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, V, (6, 12), generator=generator)
    y = x.clone()
    y[1:, 3:] = -100
    return TensorDataset(x, y)


def vectors():
    x, y = examples(8, torch.float64).tensors
    return TensorDataset(x * (1 + 2 * (torch.arange(8)[:, None] == 0)), y)


def moved(loss, rows, model, clip, given=False, **options):
    """By how many clip norms does the first or the last record move the clipped sum, without noise."""

    def total(kept):
        torch.manual_seed(0)
        engine, private, optimizer, loader = familiar(
            model().double(),
            torch.utils.data.Subset(rows, kept),
            batch_size=len(kept),
            max_grad_norm=clip,
            **options,
        )
        with engine:
            for batch in loader:
                torch.manual_seed(1)
                value = loss(private, *batch)
                engine.backward(value) if given else value.backward()
                optimizer.step()
            return torch.cat([p.grad.flatten() for p in private.parameters()]) * len(kept)

    every = list(range(len(rows)))
    whole = total(every)
    return max(float((whole - total(kept)).norm()) for kept in (every[1:], every[:-1])) / clip


def none(m, x, y):
    return ce(m(x), y, reduction="none")


def weighed(normalise):
    def loss(m, x, y):
        weights = x.abs().sum(1)
        return (none(m, x, y) * weights / normalise(weights)).mean()

    return loss


TOKEN = {
    "mean over the labels that count": lambda m, x, y: ce(m(x).flatten(0, 1), y.flatten()),
    "the same with smoothing": lambda m, x, y: ce(m(x).flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "masked by hand": lambda m, x, y: ce(m(x).transpose(1, 2), y, reduction="sum") / (y >= 0).sum(),
    "masked by hand, item": lambda m, x, y: ce(m(x).mT, y, reduction="sum") / (y >= 0).sum().item(),
    "boolean selection": lambda m, x, y: ce(m(x)[y >= 0], y[y >= 0]),
}
COUPLED = {
    "class weights": lambda m, x, y: ce(m(x), y, weight=torch.tensor([1.0, 5.0, 9.0]).double()),
    "weights by their mean": weighed(torch.mean),
    "weights by their sum": weighed(torch.sum),
    "balanced by counts": lambda m, x, y: (none(m, x, y) / torch.bincount(y, minlength=3)[y]).mean(),
    "InfoNCE": lambda m, x, y: (lambda z: ce(z @ z.t(), torch.arange(len(z))))(F.normalize(m(x), dim=1)),
    "batch-hard": lambda m, x, y: (lambda z: torch.cdist(z, z).amax(1).mean())(m(x)),
    "mixup": lambda m, x, y: ce(m(0.7 * x + 0.3 * x[torch.randperm(len(x))]), y),
    "labels of others": lambda m, x, y: ce(m(x), y) + ce(m(x), y.flip(0)),
    "inputs by the batch": lambda m, x, y: ce(m((x - x.mean(0)) / x.std(0)), y),
    "outputs centred, detached": lambda m, x, y: (lambda z: ce(z - z.detach().mean(0), y))(m(x)),
    "targets by the batch": lambda m, x, y: F.mse_loss(
        m(x)[:, 0], (y - y.double().mean()) / y.double().std()
    ),
    "advantages": lambda m, x, y: (m(x)[:, 0] * (x[:, 0] - x[:, 0].mean())).mean(),
    "by its own value": lambda m, x, y: (lambda loss: loss / loss.detach())(ce(m(x), y)),
    "by its own number": lambda m, x, y: (lambda loss: loss / loss.item())(ce(m(x), y)),
    "hardest half": lambda m, x, y: none(m, x, y).topk(4).values.mean(),
    "threshold": lambda m, x, y: (lambda v: (v * (v.detach() > v.detach().median())).mean())(none(m, x, y)),
    "maximum": lambda m, x, y: none(m, x, y).max(),
    "log-sum-exp": lambda m, x, y: none(m, x, y).logsumexp(0),
    "perplexity": lambda m, x, y: ce(m(x), y).exp(),
    "root": lambda m, x, y: F.mse_loss(m(x)[:, 0], y.double()).sqrt(),
    "variance": lambda m, x, y: (lambda v: v.mean() + v.var())(none(m, x, y)),
    "entropy of the mean": lambda m, x, y: (lambda p: (p * p.log()).sum())(m(x).softmax(1).mean(0)),
    "correlation": lambda m, x, y: (lambda z: ((z - z.mean()) * y).sum() / z.std())(m(x)[:, 0]),
    "ratio of sums": lambda m, x, y: (lambda p: 1 - (p * y[:, None]).sum() / p.sum())(m(x).sigmoid()),
    "softmax over the batch": lambda m, x, y: -m(x).log_softmax(0).gather(1, y[:, None]).mean(),
    "broadcast by mistake": lambda m, x, y: F.mse_loss(m(x)[:, :1], y.double()),
    "a sum": lambda m, x, y: ce(m(x), y, reduction="sum"),
    "divided twice": lambda m, x, y: ce(m(x), y) / len(x),
}
APART = {
    "mean": lambda m, x, y: ce(m(x), y),
    "a quarter": lambda m, x, y: ce(m(x), y) / 4,
    "sum by number": lambda m, x, y: ce(m(x), y, reduction="sum") / len(x),
    "weights of classes": lambda m, x, y: (torch.tensor([1.0, 5.0, 9.0]).double()[y] * none(m, x, y)).mean(),
    "smoothing": lambda m, x, y: ce(m(x), y, label_smoothing=0.1),
    "soft targets": lambda m, x, y: -(F.one_hot(y, 3) * m(x).log_softmax(-1)).sum(-1).mean(),
    "focal": lambda m, x, y: (lambda v: ((1 - torch.exp(-v)) ** 2 * v).mean())(none(m, x, y)),
    "tasks": lambda m, x, y: (lambda z: ce(z, y) + 0.3 * z.pow(2).mean() + z.abs().sum(1).mean())(m(x)),
    "stacked": lambda m, x, y: (lambda z: torch.stack([ce(z, y), z.pow(2).mean()]).sum())(m(x)),
    "distillation": lambda m, x, y: F.kl_div(m(x).log_softmax(1), x[:, :3].softmax(1), reduction="batchmean"),
    "quantile": lambda m, x, y: (lambda d: torch.maximum(0.9 * d, -0.1 * d).mean())(y - m(x)[:, 0]),
    "indexed": lambda m, x, y: -m(x).log_softmax(1)[torch.arange(len(x)), y].mean(),
    "a loop": lambda m, x, y: (lambda z: sum(ce(z[i], y[i]) for i in range(len(z))) / len(z))(m(x)),
    "sorted rows": lambda m, x, y: (lambda i: ce(m(x[i]), y[i]))(x.sum(1).argsort()),
    "prototypes": lambda m, x, y: ce(-torch.cdist(m(x), torch.eye(3).double()), y),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_examples_are_refused(name):
    with pytest.raises(
        (MixesExamples, ValueError),
        match=r"engine.backward\(losses\)|made from one example|the mean of each term",
    ):
        moved(COUPLED[name], vectors(), mlp, 1.0)


@pytest.mark.parametrize("name", TOKEN)
def test_means_over_counted_tokens_are_refused(name):
    with pytest.raises((MixesExamples, ValueError), match=r"engine.backward\(losses\)"):
        moved(TOKEN[name], tokens(), Tokens, 1.0)


@pytest.mark.parametrize("clip", [0.05, 1.0])
@pytest.mark.parametrize("name", APART)
def test_guarantee_a_loss_that_passes_moves_by_at_most_the_clip_norm(name, clip):
    assert moved(APART[name], vectors(), mlp, clip) <= 1 + 1e-9


@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_guarantee_backward_of_losses_clips_each_row(clip):
    assert moved(lambda m, x, y: causal_lm_losses(m(x), y), tokens(), Tokens, clip, given=True) <= 1 + 1e-9
    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected = clipped_mean(model, data, clip=clip)
    engine, model, optimizer, loader = familiar(model, data, max_grad_norm=clip)
    for inputs, labels in loader:
        engine.backward(ce(model(inputs), labels, reduction="none"))
        optimizer.step()
    assert_gradients(model, expected, tolerance=1e-12)
    assert engine.loss_report.num_given == 1 and "1 of 1 draws followed" in str(engine.loss_report)


def test_backward_of_losses_still_refuses_what_was_seen_to_mix():
    with pytest.raises(MixesExamples, match="brings examples together"):
        moved(lambda m, x, y: none(m, x, y) / x.abs().sum(), vectors(), mlp, 1.0, given=True)


def test_a_factor_that_changes_from_batch_to_batch_is_refused():
    engine, model, optimizer, loader = familiar(dataset=examples(40), batch_size=10, noise=1.0)
    with pytest.raises(MixesExamples, match="numbers in a loss to be the same in every batch"), engine:
        for number, (inputs, labels) in enumerate(loader):
            (ce(model(inputs), labels) / (1 + number)).backward()
            optimizer.step()


def test_nothing_stays_wrapped_after_the_run():
    original = torch.autograd._engine_run_backward
    engine, _model, _optimizer, _loader = familiar(noise=1.0)
    engine.detach()
    assert torch.autograd._engine_run_backward == original or engine.training.sum.checks is not None
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
