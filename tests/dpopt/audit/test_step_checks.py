# SPDX-License-Identifier: Apache-2.0
"""The checker on a step in plain torch: silent on the right one, and each bug is found by the check made for it."""

import pytest
import torch

from dpopt.audit.step_checks import (
    CAUTION,
    FAULT,
    HOLDS,
    Entry,
    TrainingStep,
    Trial,
    check_step,
    movement,
    released,
)
from tests.support.dpopt.private_steps import LOSSES, private_step, records

FEW = (1, 2, 4)
ALL = ("noise", "sensitivity", "independence", "state")

FAULTS = {
    **{loss: ("sensitivity", ("sensitivity",), FEW) for loss in LOSSES},
    "batch statistics": ("sensitivity", ("sensitivity",), FEW),
    "clip after the sum": ("sensitivity", ("sensitivity",), FEW),
    "each tensor": ("sensitivity", ("sensitivity",), FEW),
    "no clipping": ("sensitivity", ("sensitivity",), (1,)),
    "bfloat16": ("sensitivity", ("sensitivity",), (32,)),
    "drawn size": ("sensitivity", ("sensitivity",), (1,)),
    "not finite": ("hostile records", ("sensitivity",), FEW),
    "halved": ("noise scale", ("noise",), FEW),
    "nine tenths": ("noise scale", ("noise",), FEW),
    "uniform": ("noise shape", ("noise",), FEW),
    "laplace": ("noise shape", ("noise",), FEW),
    "one tensor bare": ("noise present", ("noise",), FEW),
    "one row bare": ("noise present", ("noise",), FEW),
    "every other step": ("noise steady", ("noise",), FEW),
    "scaled by the draw": ("noise and batch", ("noise",), FEW),
    "same every step": ("steps independent", ("independence",), FEW),
    "same every tensor": ("tensors independent", ("independence",), FEW),
    "one number": ("tensors independent", ("independence",), FEW),
    "buffer": ("buffers", ("state",), FEW),
    "moves bare": ("parameters", ("state",), FEW),
}
CAUTIONS = {
    "skips empty": ("empty batch", ("sensitivity",)),
    "seeded": ("restart", ("independence",)),
    "number of records": ("number of records", ("state",)),
}


def names(findings):
    return {finding.check for finding in findings}


@pytest.mark.parametrize("bug", FAULTS)
def test_each_bug_is_found_by_the_check_made_for_it(bug):
    check, checks, sizes = FAULTS[bug]
    report = check_step(private_step(bug), checks=checks, sizes=sizes, climbs=5, steps=48)
    assert check in names(report.faults), report
    assert report.exit_code == 1


@pytest.mark.parametrize("bug", CAUTIONS)
def test_what_holds_under_a_condition_is_a_caution(bug):
    check, checks = CAUTIONS[bug]
    report = check_step(private_step(bug), checks=checks, sizes=(1, 2), climbs=0)
    assert names(report.cautions) == {check} and not report.faults
    assert report.exit_code in (0, 3)


@pytest.mark.parametrize("bug", ["", "dropout"])
def test_a_right_step_is_silent(bug):
    report = check_step(private_step(bug), checks=ALL, sizes=FEW, climbs=5)
    assert (report.faults, report.cautions, report.exit_code) == ((), (), 0), report
    assert str(report) == "step: no fault found"


def test_without_a_clip_norm_the_noise_is_the_measure():
    claims = {"clip_norm": None, "expected_batch_size": None}
    assert check_step(private_step(**claims), checks=("sensitivity",), sizes=FEW, climbs=0).exit_code == 0
    for bug in ("halved", "each tensor"):
        report = check_step(private_step(bug, **claims), checks=("sensitivity",), sizes=(1,), climbs=0)
        assert names(report.faults) == {"sensitivity"}, bug


def test_the_square_root_of_the_groups_is_named():
    (fault, *_) = check_step(private_step("each tensor"), checks=("sensitivity",), sizes=(1,)).faults
    assert "sqrt(groups)" in fault.seen and fault.figure > 1.2


def test_a_fault_can_be_replayed_from_what_it_says():
    case = private_step("contrastive")
    (fault, *_) = check_step(case, checks=("sensitivity",), sizes=FEW).faults
    again = eval(fault.reproduce, {"movement": movement, "step": case, "Trial": Trial, "Entry": Entry})
    claimed = dict.fromkeys(again.norms, case.noise_std)
    assert again.over(claimed, case.noise_multiplier) == pytest.approx(fault.figure)


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 400), marks=pytest.mark.slow)])
def test_guarantee_a_correct_step_is_not_accused(seeds):
    for seed in seeds:
        report = check_step(private_step(), seed=seed, checks=("noise", "independence"), steps=40)
        assert (report.faults, report.cautions) == ((), ()), (seed, str(report))


def test_ranks_that_share_noise_are_found():
    def workers(noise_multiplier, shared):
        made = []
        for rank in range(3):
            model = torch.nn.Linear(6, 4)
            generator = torch.Generator().manual_seed(5 if shared else 5 + rank)

            def step(batch, model=model, generator=generator):
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator) * noise_multiplier

            made.append((model, step))
        return made

    for shared, verdict in ((False, HOLDS), (True, FAULT)):
        case = private_step()
        case = TrainingStep(case.make, case.records, 1.0, workers=lambda s, shared=shared: workers(s, shared))
        report = check_step(case, checks=("independence",))
        assert {f.check: f.verdict for f in report.findings}["ranks independent"] == verdict


def test_nothing_seen_is_not_nothing_found():
    def make(data, noise_multiplier):
        model = torch.nn.Linear(6, 4)
        return model, lambda batch: model.zero_grad()

    report = check_step(TrainingStep(make, records(), 1.0), sizes=(1,))
    assert report.exit_code == 3


def test_a_step_that_cannot_be_repeated_is_refused_with_the_way():
    def make(data, noise_multiplier):
        case = private_step("seeded")
        made = case.make(data, 1.0 + noise_multiplier)
        torch.seed()
        return made

    def restless(data, noise_multiplier):
        torch.seed()
        return make(data, noise_multiplier)

    with pytest.raises(ValueError, match="the same twice from one seed"):
        check_step(TrainingStep(restless, records(), 1.0))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier > 0"),
        ({"clip_norm": None}, "together"),
        ({"sampler": "balls"}, "sampler out of"),
    ],
)
def test_a_claim_that_cannot_be_meant_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        private_step(**wrong)
    with pytest.raises(ValueError, match="at least 20 steps"):
        check_step(private_step(), steps=3)


def test_random_state_is_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    released(private_step(), records()[:2], noise_multiplier=1.0, seed=9)
    assert torch.equal(torch.rand(1), expected)
    assert CAUTION != FAULT
