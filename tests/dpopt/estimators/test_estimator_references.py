# SPDX-License-Identifier: Apache-2.0
"""Every estimator, noise-free, equals its formula on dense gradients of single examples: in float64, in both doors."""

from functools import partial

import pytest
import torch
from torch.utils.data import TensorDataset

from clipping import per_layer
from clipping.clippers.robust import HuberClipper
from dpopt import PrivacyEngine
from dpopt.estimators import Centred
from tests.support.dpopt.estimator_runs import (
    SUBJECTS,
    Differences,
    Momentum,
    Weighted,
    by_clipping,
    collect,
    flat,
    gradient_of,
    huber,
    layers,
    mlp,
    opened,
    references,
    rows_of,
    vectors,
)
from tests.support.dpopt.private_runs import familiar

C, N, STEPS = 0.5, 8, 4
NAMES = tuple(references(mlp(), C, N, 1.0))


def expected_of(reference, t, model, batch, losses):
    """What the reference makes of a batch, at the parameters as they are."""
    rows = rows_of(model, batch.examples, losses)
    given = (t, rows, batch.indices, lambda values: rows_of(model, batch.examples, losses, values))
    if isinstance(reference, Differences):
        return reference.step(*given, here=flat(model.parameters()))
    return reference.step(*given)


def assert_equal(model, expected, tolerance):
    size = float(expected.abs().max())
    torch.testing.assert_close(gradient_of(model), expected, rtol=tolerance, atol=tolerance * max(size, 1e-3))


def compare(subject, estimator, reference, tolerance, *, rate=1.0, size=100, steps=STEPS, **options):
    build, data, losses = SUBJECTS[subject]
    model, data = build(), data(N)
    if callable(estimator):
        estimator = estimator(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with opened(model, estimator, clip=C, num=N, rate=rate, **options) as private:
        for t, batch in enumerate(private.batches(data, steps=steps)):
            expected = expected_of(reference, t, model, batch, losses)
            collect(private, model, losses, batch, size)
            private.release()
            assert_equal(model, expected, tolerance)
            optimizer.step()


@pytest.mark.parametrize("size", [100, 3], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_estimator_is_its_formula(subject, name, size):
    compare(subject, name, *references(SUBJECTS[subject][0](), C, N, 1.0)[name], size=size)


@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_is_its_formula_on_sampled_batches(name):
    compare("mlp", name, *references(mlp(), C, N, 0.5)[name], rate=0.5, steps=7)


@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_is_its_formula_in_two_backwards(name):
    compare("tied", name, *references(SUBJECTS["tied"][0](), C, N, 1.0)[name], two_pass=True, size=5)


@pytest.mark.parametrize("name", NAMES)
def test_mean_losses_of_parts_are_the_same(name):
    compare("tied", name, *references(SUBJECTS["tied"][0](), C, N, 1.0)[name], mean_losses=True, size=3)


@pytest.mark.parametrize("rule", ["flat", "huber"])
@pytest.mark.parametrize("two_pass", [False, True])
def test_a_centre_goes_with_groups(rule, two_pass):
    def estimator(model):
        inner = {"flat": None, "huber": lambda c: HuberClipper(c, 0.1)}[rule]
        options = {} if inner is None else {"rule": inner}
        return Centred(C, lambda c: per_layer(model, c, **options), rate=0.5)

    groups = layers(mlp())
    within = C / len(groups) ** 0.5

    def by_layer(rows):
        found = torch.zeros_like(rows)
        for group in groups:
            part = rows[:, group]
            found[:, group] = (
                huber(within, 0.1)(part)
                if rule == "huber"
                else part * by_clipping(part.norm(dim=1), within).unsqueeze(1)
            )
        return found

    compare("mlp", estimator, Momentum(N, by_layer, 0.5), 1e-9, two_pass=two_pass, size=5)


# -- the familiar door ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", NAMES)
def test_the_familiar_door_gives_the_same_gradients(name, parts):
    reference, tolerance = references(mlp(), C, N, 1.0)[name]
    data = vectors(N)
    dataset = TensorDataset(*(torch.stack(column) for column in zip(*data, strict=True)))
    engine, model, optimizer, loader = familiar(
        mlp(),
        dataset,
        max_grad_norm=C,
        clipping=name,
        engine=PrivacyEngine(accountant="rdp", insecure_seed=1),
    )
    criterion = torch.nn.functional.cross_entropy
    needs_function = name.startswith(("diff2", "clip21"))
    t = 0
    for _ in range(STEPS):
        for inputs, labels in loader:
            rows = rows_of_rows(model, inputs, labels)
            given = (t, rows, range(N), partial(rows_of_rows, model, inputs, labels))
            here = {"here": flat(model.parameters())} if isinstance(reference, Differences) else {}
            expected = reference.step(*given, **here)
            for x, y, part in zip(
                inputs.chunk(parts), labels.chunk(parts), torch.arange(N).chunk(parts), strict=True
            ):
                if needs_function:
                    engine.evaluate(
                        lambda x=x, y=y: criterion(model(x), y, reduction="none"), records=part.tolist()
                    )
                else:
                    criterion(model(x), y).backward()
            optimizer.step()
            assert_equal(model, expected, tolerance)
            t += 1
    engine.detach()
    assert t == STEPS


def rows_of_rows(model, inputs, labels, values=None):
    def losses(model, batch):
        x, y = (torch.stack(column) for column in zip(*batch, strict=True))
        return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

    # the hooks of the engine stay on a copy: they know that they are not at home
    return rows_of(fresh(model), list(zip(inputs, labels, strict=True)), losses, values)


def fresh(model):
    made = mlp()
    made.load_state_dict(model.state_dict())
    return made


# -- padding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("clip21")])
def test_rows_outside_keep_add_nothing(name):
    reference, tolerance = references(mlp(), C, N, 0.5)[name]
    build, data, losses = SUBJECTS["mlp"]
    model, data = build(), data(N)
    filler = (torch.full((4,), 1e3).double(), torch.tensor(0))
    with opened(model, name, clip=C, num=N, rate=0.5) as private:
        for t, batch in enumerate(private.batches(data, steps=5)):
            expected = expected_of(reference, t, model, batch, losses)
            rows, keep = batch.padded(N, filler)
            private.evaluate(lambda r=rows: losses(model, r), keep=keep)
            private.release()
            assert_equal(model, expected, tolerance)
            torch.optim.SGD(model.parameters(), lr=0.3).step()


def test_the_references_differ_from_plain_clipping():
    """Else the tests above would compare flat clipping with itself."""
    build, data, losses = SUBJECTS["mlp"]
    model, data = build(), data(N)
    rows = rows_of(model, data, losses)
    assert (rows.norm(dim=1) > C).any()
    plain = Weighted(C, N, by_clipping)
    for name, (reference, _) in references(model, C, N, 1.0).items():
        found = []
        for t in range(STEPS):
            given = (t, rows * (1 + t), range(N), lambda values: rows / 3)
            here = {"here": torch.full((rows.shape[1],), 0.01 * t).double()}
            found.append(reference.step(*given, **(here if isinstance(reference, Differences) else {})))
        same = [torch.allclose(x, plain.step(t, rows * (1 + t), range(N), None)) for t, x in enumerate(found)]
        assert all(same) is (name == "flat"), name
