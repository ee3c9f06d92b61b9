# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a causal language model under one set of settings, with dpopt, with Opacus, and without privacy.

One record is one example: a prompt and the target that the loss counts. All runs draw Poisson batches at the
same rate, cut them into the same micro-batches by length, and step the same AdamW at a constant rate.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpopt import FlatClipper, GaussianMechanism, PrivateTraining, causal_lm_losses, poisson
from dpopt.losses import IGNORED, causal_lm_totals


@dataclass(frozen=True)
class Example:
    """Token ids; the first `num_prompt` of them are not counted by the loss."""

    ids: tuple[int, ...]
    num_prompt: int


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    steps: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    clip_norm: float


@dataclass(frozen=True)
class Run:
    """One finished run; `nll` is the held-out loss per counted token in nats, `seconds` without evaluation."""

    library: str
    epsilon: float | None
    seed: int
    noise_multiplier: float
    learning_rate: float
    nll: float
    seconds: float


def load(path: Path) -> nn.Module:
    """The causal language model in `path`, in float32, without a cache."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config.use_cache = False
    return model.train()


def collate(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """(B, T) token ids and labels, padded on the right, where a causal model needs no mask."""
    ids = torch.full((len(examples), max(len(e.ids) for e in examples)), pad)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, example.num_prompt : len(tokens)] = tokens[example.num_prompt :]
    return ids, labels


def by_length(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Micro-batches of similar lengths: less padding, and the same sum."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


@torch.no_grad()
def held_out(model: nn.Module, examples: Sequence[Example], pad: int, size: int = 64) -> float:
    """Loss per counted token over all `examples`."""
    model.eval()
    total, count = 0.0, 0
    for part in by_length(examples, size):
        ids, labels = collate(part, pad)
        sums, counted = causal_lm_totals(model(input_ids=ids).logits, labels)
        total, count = total + sums.sum().item(), count + int(counted.sum())
    model.train()
    return total / count


def _losses(model: nn.Module, part: Sequence[Example], pad: int) -> Tensor:
    ids, labels = collate(part, pad)
    return causal_lm_losses(model(input_ids=ids).logits, labels)


def _adamw(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0, fused=True)


def with_dpopt(
    model: nn.Module, train: Sequence[Example], pad: int, settings: Settings, noise: float, seed: int
) -> None:
    """Fine-tune with `PrivateTraining`. The seed makes the run repeatable, and only fit for a benchmark."""
    optimizer = _adamw(model, settings)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        with PrivateTraining(
            model,
            clipper=FlatClipper(settings.clip_norm),
            mechanism=GaussianMechanism(noise),
            sampling=poisson(num_records=len(train), batch_size=settings.batch_size),
            ledger=Path(folder) / "ledger.jsonl",
            insecure_seed=seed,
        ) as private:
            for batch in private.batches(train, steps=settings.steps):
                drawn = [example for example in batch.examples if isinstance(example, Example)]
                for part in by_length(drawn, settings.micro_batch):
                    private.accumulate(_losses(model, part, pad))
                private.release()
                optimizer.step()


def without_privacy(
    model: nn.Module, train: Sequence[Example], pad: int, settings: Settings, noise: float, seed: int
) -> None:
    """Fine-tune on the mean loss of Poisson batches; `noise` is 0."""
    assert noise == 0
    optimizer = _adamw(model, settings)
    sampling = poisson(num_records=len(train), batch_size=settings.batch_size)
    random = torch.Generator().manual_seed(seed)
    for _ in range(settings.steps):
        drawn = [train[index] for index in sampling.draw(len(train), random)]
        for part in by_length(drawn, settings.micro_batch):
            (_losses(model, part, pad).sum() / settings.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_opacus(
    model: nn.Module, train: Sequence[Example], pad: int, settings: Settings, noise: float, seed: int
) -> None:
    """Fine-tune with Opacus in hooks mode, Poisson loader, the same micro-batches through skipped steps."""
    from opacus import PrivacyEngine

    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    indices = TensorDataset(torch.arange(len(train)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=_adamw(model, settings),
            data_loader=DataLoader(indices, batch_size=settings.batch_size, generator=random),
            noise_multiplier=noise,
            max_grad_norm=settings.clip_norm,
            grad_sample_mode="hooks",
        )
        done = 0
        while done < settings.steps:
            for (drawn,) in loader:
                parts = list(by_length([train[i] for i in drawn.tolist()], settings.micro_batch))
                for number, part in enumerate(parts, start=1):
                    optimizer.signal_skip_step(number < len(parts))
                    _losses(private, part, pad).mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                done += 1
                if done == settings.steps:
                    break
    private.remove_hooks()


LIBRARIES = {"dpopt": with_dpopt, "opacus": with_opacus, "non-private": without_privacy}


@dataclass(frozen=True)
class Job:
    """One run to make: plain data, so that a process of its own can make it."""

    model: Path
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    pad: int
    settings: Settings
    library: str
    epsilon: float | None
    noise_multiplier: float
    seed: int


def work(job: Job) -> Run | str:
    """Make one run on one thread; a line that says why where it failed."""
    torch.set_num_threads(1)
    model = load(job.model)
    started = time.perf_counter()
    try:
        LIBRARIES[job.library](model, job.train, job.pad, job.settings, job.noise_multiplier, job.seed)
    except Exception as error:
        return f"{job.library}, epsilon {job.epsilon}, seed {job.seed}: {type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    nll = held_out(model, job.validation, job.pad)
    run = Run(
        job.library, job.epsilon, job.seed, job.noise_multiplier, job.settings.learning_rate, nll, seconds
    )
    print(f"  {asdict(run)}", flush=True)
    return run
