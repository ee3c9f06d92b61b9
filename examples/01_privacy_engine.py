# SPDX-License-Identifier: Apache-2.0
"""Digits with a small CNN: the familiar door. Five lines about privacy, the rest is an ordinary script.

    python examples/01_privacy_engine.py                     # digits rendered from matplotlib's fonts, offline
    python examples/01_privacy_engine.py --data mnist.npz    # or MNIST, as x_train, y_train, x_test, y_test

The unit of privacy is one image. What leaves the training, the model's weights, is (epsilon, delta)-private.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpopt import BatchMemoryManager, PrivacyEngine

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
         "DejaVuSerif-Italic", "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
         "cmr10", "cmss10", "cmtt10", "cmb10")  # fmt: skip


def rendered_digits(num: int, seed: int) -> TensorDataset:
    """`num` images of 28 x 28: a digit of some font and size, shifted, rotated, with a little noise."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", size) for name in FONTS for size in (18, 21, 24)]
    source = np.random.default_rng(seed)
    labels = source.integers(0, 10, num)
    images = np.empty((num, 28, 28), dtype=np.float32)
    for index, label in enumerate(labels):
        image = Image.new("L", (28, 28))
        place = tuple(14 + source.uniform(-3, 3, 2))
        font = fonts[source.integers(len(fonts))]
        ImageDraw.Draw(image).text(place, str(label), fill=255, font=font, anchor="mm")
        angle = source.uniform(-20, 20)
        images[index] = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR)) / 255
    images += 0.1 * source.standard_normal(images.shape, dtype=np.float32)
    return TensorDataset(torch.from_numpy(images)[:, None], torch.from_numpy(labels))


def mnist(path: Path) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images of an .npz file in the layout of Keras."""
    with np.load(path) as arrays:
        pair = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
    train, test = (
        TensorDataset(torch.from_numpy(x).float()[:, None] / 255, torch.from_numpy(y).long()) for x, y in pair
    )
    return train, test


def cnn() -> nn.Module:
    """Two strided convolutions and two linear layers, 26 010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of correct answers."""
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train privately and print accuracy and epsilon after every epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="an .npz of MNIST; rendered digits without it")
    parser.add_argument("--records", type=int, default=8_000, help="rendered training images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--lr", type=float, default=2.0)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.data:
        train, test = mnist(args.data)
    else:
        train, test = rendered_digits(args.records, seed=0), rendered_digits(1000, seed=1)
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.5)
    loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)

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
    print(f"{len(train)} images, noise multiplier {engine.noise_multiplier:.3f}")
    for epoch in range(1, args.epochs + 1):
        # Poisson batches vary in size; this bounds what is in memory at once.
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=128, optimizer=optimizer
        ) as parts:
            for images, labels in parts:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
        epsilon = engine.get_epsilon(args.delta)
        print(
            f"epoch {epoch}: test accuracy {accuracy(model, test):.3f}, epsilon {epsilon:.2f} at {args.delta}"
        )


if __name__ == "__main__":
    main()
