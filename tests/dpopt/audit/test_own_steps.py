# SPDX-License-Identifier: Apache-2.0
"""What the library says that it cannot see of a model or a loss, the step checker finds; and Opacus is not accused."""

import sys
from pathlib import Path

import torch.nn.functional as F

from dpopt.audit.step_checks import check_step

sys.path.append(str(Path(__file__).resolve().parents[2] / "mutations"))
from own_steps import STEPS, each, explicit, mlp


def weighed(model, x, y):
    """A weight that numpy made from the batch: by how far the largest is from the rest."""
    largest = float(x.nan_to_num(0, 0, 0).abs().max())
    return each(model, x, y) * 100 / (1 + largest)


def test_what_the_library_cannot_see_the_checker_finds():
    report = check_step(explicit(losses=weighed), checks=("sensitivity",), sizes=(4, 16), climbs=0, steps=24)
    faults = {fault.check for fault in report.faults}
    assert "sensitivity" in faults, report


def test_a_loss_that_is_apart_is_not_accused():
    def smooth(model, x, y):
        return F.cross_entropy(model(x), y, reduction="none", label_smoothing=0.1)

    report = check_step(explicit(losses=smooth), checks=("sensitivity",), sizes=(4,), climbs=0, steps=24)
    assert report.faults == () and len(STEPS) > 10


def test_a_model_in_sixteen_bits_is_not_accused_of_its_rounding():
    def losses(model, x, y):
        return each(model, x.bfloat16(), y).float()

    case = explicit(model=lambda: mlp().bfloat16(), losses=losses)
    report = check_step(case, checks=("noise", "sensitivity"), sizes=(1, 16), climbs=0, steps=24)
    assert (report.faults, report.cautions) == ((), ()), report
