# SPDX-License-Identifier: Apache-2.0
"""Bugs in the noise: missing, too small, shared, repeated, of another law, or in the wrong place."""

from tests.mutations import places as at
from tests.mutations.mutating import Edit, Mutation

PRESENT, SCALE, BATCH = ("noise present",), ("noise scale",), ("noise and batch",)
STEPS, TENSORS, RUNS = ("steps independent",), ("tensors independent",), ("runs independent",)
SENSITIVITY = ("sensitivity", "sensitivity to noise")
_STD = "std = self.noise_multiplier * clipped.sensitivity"
_ADD = "add_normal(total, std, noise(name, total.device), divisor)"
_DRAWN = 'return cipher_key(self.key, "noise", charge, name)'
_TORCH = 'return generator(self.key, "noise", charge, name, device=device)'
_GROUP_STD = "self.noise_multiplier * bound * math.sqrt(whole / share)"
_GROUP_ADD = "add_normal(released[name], std, noise(name, released[name].device), divisor)"
_STDS = "tests/dpopt/mechanisms/test_group_gaussian.py"
_GUARANTEES = "tests/dpopt/release/test_step_guarantees.py"
_ESTIMATORS = "tests/dpopt/estimators/test_estimator_guarantees.py"


def of_noise(name, place, old, new, step="explicit", checks=(), tests=(), quick=False):
    return Mutation(name, "noise", (Edit(place, old, new),), step, checks, tests, quick)


RELEASE = f"{at.GAUSSIAN}.release"
THE_MECHANISM = (f"{_GUARANTEES}::test_guarantee_release_is_the_charged_mechanism",)

BUGS = (
    of_noise("no noise", RELEASE, _ADD, "total.div_(divisor)", checks=PRESENT, tests=THE_MECHANISM, quick=True),
    of_noise("half the noise", RELEASE, _STD, f"{_STD} / 2", checks=SCALE, tests=THE_MECHANISM, quick=True),
    of_noise("a tenth less noise", RELEASE, _STD, f"{_STD} * 0.9", checks=SCALE, tests=THE_MECHANISM, quick=True),
    of_noise("noise without the clip norm", RELEASE, _STD, "std = self.noise_multiplier", checks=SCALE,
             tests=THE_MECHANISM, quick=True),
    of_noise("variance taken for the deviation", RELEASE, _STD, "std = self.noise_multiplier**0.5 * clipped.sensitivity",
             checks=SCALE, tests=THE_MECHANISM),
    of_noise("noise divided by the batch size twice", RELEASE, _ADD, _ADD.replace("std,", "std / divisor,"), checks=SCALE,
             tests=THE_MECHANISM),
    of_noise("noise divided by the number of tensors", RELEASE, _STD, f"{_STD} / len(released) ** 0.5", checks=SCALE,
             tests=THE_MECHANISM),
    of_noise("biases without noise", RELEASE, _ADD, f"total.div_(divisor) if name.endswith('bias') else {_ADD}",
             checks=PRESENT, tests=THE_MECHANISM, quick=True),
    of_noise("the last tensor without noise", RELEASE, _ADD,
             f"total.div_(divisor) if total is list(released.values())[-1] else {_ADD}", checks=PRESENT,
             tests=THE_MECHANISM),
    of_noise("the first row without noise", RELEASE, _ADD,
             f"kept = total[:1] / divisor; {_ADD}; total[:1] = kept", checks=PRESENT, tests=THE_MECHANISM),
    of_noise("no noise where nobody was drawn", RELEASE, _ADD,
             f"{_ADD} if any(bool(t.any()) for t in clipped.total.values()) or std == 0 else total.div_(divisor)",
             checks=BATCH, tests=(f"{_GUARANTEES}::test_guarantee_release_is_the_charged_mechanism_for_group_clippers",)),
    of_noise("noise that grows with the sum", RELEASE, _ADD, _ADD.replace("std,", "std * (1 + float(total.abs().max())),"),
             checks=(*BATCH, *SCALE), tests=THE_MECHANISM),
    of_noise("uniform noise", RELEASE, _ADD,
             "total.add_((type(total).new_empty(total, total.shape).uniform_(-1, 1)) * 3**0.5 * std).div_(divisor)",
             checks=("noise shape",), tests=THE_MECHANISM, quick=True),
    of_noise("one number of noise for each tensor", RELEASE, _ADD,
             "total.add_(total.new_empty(()).normal_(0.0, std)).div_(divisor)", checks=(*TENSORS, *STEPS),
             tests=THE_MECHANISM),
    of_noise("noise rounded to few bits", RELEASE, _ADD, f"{_ADD}; total.copy_((total * 8 / std * divisor).round() * std / 8 / divisor)",
             checks=(*PRESENT, "noise shape"), tests=THE_MECHANISM),
    of_noise("noise from a public seed", at.SECRET_KEY, "return RandomKey(os.urandom(32))",
             "return RandomKey(str(torch.initial_seed()).zfill(32).encode()[-32:])", checks=("restart",),
             tests=("tests/dpopt/randomness/test_keys.py", "tests/dpopt/budget/test_resume.py"), quick=True),
    of_noise("the same key in every run", at.SECRET_KEY, "return RandomKey(os.urandom(32))", "return RandomKey(bytes(32))",
             checks=RUNS, tests=("tests/dpopt/randomness/test_keys.py", "tests/dpopt/budget/test_resume.py"), quick=True),
    Mutation("the same noise in every step", "noise", (
        Edit(f"{at.TIER}.noise", _DRAWN, _DRAWN.replace("charge, ", "")),
        Edit(f"{at.TIER}.noise", _TORCH, _TORCH.replace("charge, ", ""))), "explicit", STEPS, THE_MECHANISM, True),
    Mutation("the same noise in every tensor", "noise", (
        Edit(f"{at.TIER}.noise", _DRAWN, _DRAWN.replace(", name", "")),
        Edit(f"{at.TIER}.noise", _TORCH, _TORCH.replace("name, ", ""))), "explicit", TENSORS, THE_MECHANISM),
    Mutation("noise repeated after ten steps", "noise", (
        Edit(f"{at.TIER}.noise", _DRAWN, _DRAWN.replace("charge,", "charge % 10,")),
        Edit(f"{at.TIER}.noise", _TORCH, _TORCH.replace("charge,", "charge % 10,"))), "explicit", STEPS, THE_MECHANISM),
    of_noise("the same words for every part of a large tensor", at.NORMALS,
             "stream.fill(buffer[:half])", "key.stream().fill(buffer[:half])", step="",
             tests=("tests/dpopt/randomness/test_normals.py",)),
    of_noise("half the noise in double precision", "dpopt.randomness.normals:_add_in_double", "std * normal", "std / 2 * normal", step="",
             tests=("tests/dpopt/release/test_noise.py", "tests/dpopt/randomness/test_normals.py", *THE_MECHANISM)),
    of_noise("noise for each part of a batch", f"{at.TRAINING}.accumulate", "self.sum.add(summed, keep, records)",
             "self.sum.add(summed, keep, records)\n"
             "        for total in self.sum.sums.totals.values():\n"
             "            total.add_(total.clone().normal_(0.0, self.mechanism.noise_multiplier))",
             step="two parts", checks=SCALE, tests=THE_MECHANISM, quick=True),
    of_noise("groups that forget their square root", f"{at.GROUP_GAUSSIAN}.stds", _GROUP_STD, "self.noise_multiplier * bound",
             step="group noise", checks=SENSITIVITY, tests=(f"{_STDS}::test_guarantee_the_charge_covers_the_exact_joint_curve",)),
    of_noise("shares that sum to more than one", f"{at.GROUP_GAUSSIAN}.stds", "whole = math.fsum(shares)", "whole = max(shares)",
             step="group noise", checks=SENSITIVITY, tests=(f"{_STDS}::test_guarantee_the_charge_covers_the_exact_joint_curve",)),
    of_noise("no noise in the last group", f"{at.GROUP_GAUSSIAN}.release", _GROUP_ADD,
             f"released[name].div_(divisor) if name == max(released) else {_GROUP_ADD}",
             step="group noise", checks=PRESENT, tests=(_STDS,)),
    of_noise("half the noise on the grid", f"{at.GRID}:GridGaussianMechanism.release",
             "fineness(group.sensitivity, group.ratio", "2 * fineness(group.sensitivity, group.ratio", step="secure",
             checks=SCALE, tests=("tests/dpopt/mechanisms/test_grid_gaussian.py",)),
    of_noise("rounds on one draw without more noise", at.ONE_RELEASE, "scaled(mechanism, math.sqrt(stage.rounds))", "mechanism",
             step="", tests=(f"{_ESTIMATORS}::test_guarantee_rounds_on_one_draw_cost_one_release",)),
    of_noise("rounds that share their noise", at.NUMBERED, 'f"{number}{ROUND}"', '""', step="",
             tests=("tests/dpopt/estimators/test_estimator_guarantees.py", "tests/dpopt/estimators/test_estimator_attacks.py")),
    of_noise("a schedule charged at its first noise", f"{at.PRICES}:prices", "1.0 if estimator.factors is None else estimator.factors(charge)",
             "1.0 if estimator.factors is None else estimator.factors(0)", step="",
             tests=(f"{_ESTIMATORS}::test_guarantee_each_step_is_charged_with_its_own_noise",)),
    of_noise("a varied noise charged as before", f"{at.TRAINING}.vary", "self.payments.settle(self._prices)", "pass", step="",
             tests=("tests/dpopt/compatibility/test_schedulers.py::test_guarantee_a_varied_step_is_charged_with_its_own_noise",)),
    Mutation(
        "a fork that goes on with its parent's noise",
        "noise",
        (
            Edit(f"{at.UNCHANGED}:refuse_fork", "if os.getpid() != pid:", "if False:"),
            Edit(f"{at.FILE}.require_own", "if self._pid != os.getpid():", "if False:"),
        ),
        "",
        (),
        ("tests/accountants/ledger/test_ledger.py", "tests/dpopt/test_faults.py"),
    ),
    of_noise("ranks that each release their own", f"{at.UNCHANGED}:refuse_distributed", "get_world_size() > 1", "get_world_size() > 99",
             step="", tests=("tests/dpopt/guards/test_one_process.py",)),
    of_noise("a key that can be saved", f"{at.KEY}.__reduce__", "raise TypeError(", "return str(", step="",
             tests=("tests/dpopt/randomness/test_keys.py",)),
)  # fmt: skip
