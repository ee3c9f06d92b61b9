# SPDX-License-Identifier: Apache-2.0
"""The loops of other libraries around a private model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from tests.support.dpopt.private_runs import D, assert_gradients, clipped_mean, examples, familiar, mlp


@pytest.mark.parametrize("loader_too", [False, True])
def test_accelerate_leaves_a_private_loader_as_it_is(loader_too):
    accelerate = pytest.importorskip("accelerate")
    model, data = mlp(), examples(8)
    expected = clipped_mean(model, data)
    engine, model, optimizer, loader = familiar(model, data)
    accelerator = accelerate.Accelerator(cpu=True)
    if loader_too:
        model, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
        assert prepared is loader
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    for inputs, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()
    assert_gradients(model, expected)
    engine.detach()


class Rows(Dataset):
    def __init__(self, num):
        self.data = examples(num)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {"x": self.data[index][0], "labels": self.data[index][1]}


class Scoring(nn.Module):
    """A model as a Trainer wants it: keywords in, a dictionary with the loss out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trained(tmp_path, *, in_parts=False, **options):
    """(engine, norms of each released gradient as the step saw it)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    engine, model, optimizer, loader = familiar(
        Scoring(), Rows(24), noise=100.0, optimizer=None, batch_size=8
    )
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.layer.weight.grad))

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return loader

        def training_step(self, model, inputs, num_items_in_batch=None):
            if not in_parts:
                return super().training_step(model, inputs, num_items_in_batch)
            for x, y in zip(inputs["x"].split(3), inputs["labels"].split(3), strict=True):
                loss = model(x, y)["loss"]
                loss.backward()
            return loss.detach()

    given = {"num_train_epochs": 2, "max_grad_norm": 1.0, **options}
    trainer = Trainer(
        model=model, train_dataset=Rows(24), optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
        args=transformers.TrainingArguments(
            str(tmp_path), report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no", **given
        ),
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        engine.detach()
    return engine, [float(g.norm()) for g in seen if g is not None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_trainer_of_transformers_cuts_no_released_gradient(tmp_path, in_parts):
    """Its max_grad_norm looks at `.grad` between backward and step, where a private model has none."""
    engine, norms = trained(tmp_path, in_parts=in_parts)
    assert engine.training.steps == len(norms) == 6
    assert min(norms) > 1.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradient_accumulation_over_draws_is_refused_with_the_way(tmp_path):
    with pytest.raises(RuntimeError, match=r"accumulation over batches \(gradient_accumulation_steps=1\)"):
        trained(tmp_path, gradient_accumulation_steps=2)
