# SPDX-License-Identifier: Apache-2.0
"""Which package does a docstring come from? The mean of word embeddings, trained privately.

    python examples/03_text_classifier.py

An embedding has one row for each word, and an example touches few of them: dpopt keeps its gradient as rows.
The unit of privacy is one docstring. The words are hashed, so there is no vocabulary that could tell of them.
"""

import argparse
import random
import re
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpopt import PrivacyEngine
from dpopt.embedded.docstrings import docstrings_of, package_folder

PACKAGES = ("networkx", "sympy", "scipy")
LENGTH = 64
_WORD = re.compile(r"[a-z]{2,}")

Record = tuple[list[int], int]


def hashed(text: str, num_buckets: int) -> list[int]:
    """The first words of the text as numbers from 1 on; the package's own name is left out, it would tell."""
    words = [word for word in _WORD.findall(text.lower()) if word not in PACKAGES]
    return [1 + zlib.crc32(word.encode()) % num_buckets for word in words[:LENGTH]]


def text_records(most: int, num_buckets: int) -> tuple[list[Record], list[Record]]:
    """Training and test records: (hashed words, package)."""
    records: list[Record] = []
    for label, package in enumerate(PACKAGES):
        found = list(docstrings_of(package_folder(package), root=package, skip=frozenset({"tests"})))
        random.Random(0).shuffle(found)
        records += [(hashed(docstring.text, num_buckets), label) for docstring in found[:most]]
    random.Random(1).shuffle(records)
    cut = len(records) * 9 // 10
    return records[:cut], records[cut:]


def collate(records: list[Record]) -> tuple[Tensor, Tensor]:
    """Words padded with 0 to a fixed length, and labels."""
    words = torch.tensor([words + [0] * (LENGTH - len(words)) for words, _ in records])
    return words, torch.tensor([label for _, label in records])


class MeanOfWords(nn.Module):
    """Words -> embeddings -> their mean -> a package."""

    def __init__(self, num_buckets: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) words, 0 for none, to (B, packages) logits."""
        present = (words > 0).unsqueeze(-1)
        mean = (self.embedding(words) * present).sum(1) / present.sum(1).clamp(min=1)
        return self.head(mean)


@torch.no_grad()
def accuracy(model: nn.Module, records: list[Record]) -> float:
    """Share of correct answers."""
    words, labels = collate(records)
    return float((model(words).argmax(1) == labels).float().mean())


def main() -> None:
    """Train privately and print accuracy and epsilon after every epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=2000, help="docstrings of each package at most")
    parser.add_argument("--buckets", type=int, default=4000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test = text_records(args.texts, args.buckets)
    model = MeanOfWords(args.buckets, args.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    loader = DataLoader(train, batch_size=args.batch_size, collate_fn=collate)  # pyright: ignore

    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        epochs=args.epochs,
        max_grad_norm=1.0,
    )
    print(
        f"{len(train)} docstrings of {len(PACKAGES)} packages, noise multiplier {engine.noise_multiplier:.3f}"
    )
    for epoch in range(1, args.epochs + 1):
        for words, packages in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(words), packages).backward()
            optimizer.step()
        epsilon = engine.get_epsilon(args.delta)
        print(
            f"epoch {epoch}: test accuracy {accuracy(model, test):.3f}, epsilon {epsilon:.2f} at {args.delta}"
        )


if __name__ == "__main__":
    main()
