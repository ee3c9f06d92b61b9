# SPDX-License-Identifier: Apache-2.0
"""What did the training really leak? Canaries in the run, and a lower bound on epsilon beside the claimed upper one.

    python examples/07_audit.py --epsilon 4 --canaries 1000

Texts as bags of words are sorted into two classes. A thousand made-up records, canaries, are added, each by a secret
fair coin: each is a gradient at the weight of a word that no text has, so that canaries disturb neither the model nor
one another. They are drawn, clipped and noised as every record is. Afterwards the coins are opened: how well do the
released gradients tell who was in? The same is asked of shuffled coins, which must show nothing, and of a run whose
noise is only half of what its ledger says, which must be found out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dpopt import FlatClipper, GaussianMechanism, PrivateTraining, noise_multiplier, poisson
from dpopt.audit import (
    Canaries,
    Evidence,
    LowerBound,
    fdp_one_run,
    full_signal,
    gdp_scores,
    order_statistics,
    per_step,
    steinke,
)

DELTA, WORDS, RATE = 1e-5, 200, 0.5

WHOLE_RUN: tuple[Callable[..., LowerBound], ...] = (
    full_signal, gdp_scores, order_statistics, fdp_one_run, steinke,
)  # fmt: skip


def texts(num: int, unused: int) -> list[tuple[Tensor, Tensor]]:
    """Bags of words of two classes that prefer different words; behind them, words that none has."""
    found = []
    for number in range(num):
        label = number % 2
        likely = torch.linspace(0.02, 0.2, WORDS) if label else torch.linspace(0.2, 0.02, WORDS)
        found.append((torch.cat((torch.bernoulli(likely), torch.zeros(unused))), torch.tensor(label)))
    return found


class HalfTheNoise(GaussianMechanism):
    """A bug: the ledger is charged for twice the noise that is added."""

    def release(self, clipped, noise, divisor: float = 1.0):
        """Half of it."""
        return GaussianMechanism(self.noise_multiplier / 2).release(clipped, noise, divisor)


def run(mechanism: GaussianMechanism, settings: argparse.Namespace) -> tuple[PrivateTraining, float]:
    """Train with canaries; the finished run, and its loss on texts that nobody trained on."""
    num = settings.canaries
    model = nn.Linear(WORDS + num, 2, bias=False)
    nn.init.zeros_(model.weight)
    data, optimizer = texts(settings.texts, num), torch.optim.SGD(model.parameters(), lr=0.5)
    private = PrivateTraining(
        model, clipper=FlatClipper(1.0), mechanism=mechanism,
        sampling=poisson(num_records=len(data), batch_size=RATE * len(data)),
        audit=Canaries(num, where={"weight": range(WORDS, WORDS + num)}, untouched=True),
    )  # fmt: skip
    with private:
        for batch in private.batches(data, steps=settings.steps):
            if batch.examples:
                rows, labels = (torch.stack(column) for column in zip(*batch.examples, strict=True))  # pyright: ignore
                private.accumulate(F.cross_entropy(model(rows), labels, reduction="none"))
            private.release()
            optimizer.step()
    rows, labels = (torch.stack(column) for column in zip(*texts(200, num), strict=True))
    return private, F.cross_entropy(model(rows), labels).item()


def shown(evidence: tuple[Evidence, ...]) -> list[LowerBound]:
    """Every bound, at 95 % confidence each."""
    return [bound(evidence[0], DELTA) for bound in WHOLE_RUN] + [per_step(evidence[-1], DELTA)]


def main() -> None:
    """Read the command line, train twice, and show what each run leaked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=400, help="how many there are")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--canaries", type=int, default=1000, help="made-up records, each in by a coin")
    parser.add_argument("--epsilon", type=float, default=4.0, help="budget at delta 1e-5")
    settings = parser.parse_args()
    torch.manual_seed(0)
    noise = noise_multiplier(epsilon=settings.epsilon, delta=DELTA, sampling_rate=RATE, steps=settings.steps)
    right, loss = run(GaussianMechanism(noise), settings)
    wrong, _ = run(HalfTheNoise(noise), settings)
    first = right.evidence[0]
    order = torch.randperm(first.num_records).numpy()
    shuffled = Evidence(first.scores, first.included[order], "shuffled coins", True, first.noise_std)

    print(f"loss {loss:.3f}; claimed: epsilon {right.epsilon(DELTA):.2f} at delta {DELTA:g}")
    table = Table(title="lower bounds, each at 95 % confidence")
    for column in ("bound", "this run", "half the noise", "shuffled coins", "at most, with so many canaries"):
        table.add_column(column)
    nothing = [f"{bound(shuffled, DELTA).epsilon:.2f}" for bound in WHOLE_RUN] + ["-"]
    for mine, broken, none in zip(shown(right.evidence), shown(wrong.evidence), nothing, strict=True):
        table.add_row(
            mine.name, f"{mine.epsilon:.2f}", f"{broken.epsilon:.2f}", none, f"{mine.largest_possible:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
