# SPDX-License-Identifier: Apache-2.0
"""Bugs in what one record adds: clipped too late, too little, in pieces, not at all, together with others, or twice."""

from tests.mutations import places as at
from tests.mutations.mutating import Edit, Mutation

SENSITIVITY, HOSTILE = ("sensitivity", "sensitivity to noise"), ("hostile records",)
_LAW = "tests/clipping/collectors/test_sensitivity.py::test_guarantee_one_example_moves_the_sum_by_at_most_the_sensitivity"
_CONTRIBUTIONS = "tests/clipping/contributions/test_contributions.py::test_guarantee_every_contribution_keeps_its_sensitivity"
_NORMS = "norms = _total(squares, num_examples).sqrt_() * scale"
_WEIGHTS = "usable(quotient(self.clip_norm, norms).clamp_max(1), norms)"
_LOSSES = "tests/dpopt/user_programs/test_coupled_losses.py"
_REFUSALS = ("tests/clipping/recording/test_recording_refusals.py",)
MEASURED = f"{at.SUMS}.measured"
FLAT = f"{at.FLAT}.weights"
CHECK_LOSSES = (
    Edit(f"{at.TRAINING}.check_losses", "step = self.sum", "return\n    step = self.sum"),
    Edit(
        "clipping.validators.runtime_probe:Probing.begin",
        "if self.num_batches in DUE:",
        "self.done = True\n    if False:",
    ),
)


def of_clipping(name, place, old, new, step="explicit", checks=SENSITIVITY, tests=(), quick=False):
    return Mutation(name, "clipping", (Edit(place, old, new),), step, checks, tests, quick)


def coupled(name, quick=False):
    return Mutation(
        f"a coupled loss is let through: {name}",
        "clipping",
        CHECK_LOSSES,
        name,
        SENSITIVITY,
        (_LOSSES,),
        quick,
    )


BUGS = (
    of_clipping("no clipping", FLAT, _WEIGHTS, "norms.new_ones(norms.shape)", tests=(_LAW,), quick=True),
    of_clipping("twice the clip norm", FLAT, "self.clip_norm", "2 * self.clip_norm", tests=(_LAW,), quick=True),
    of_clipping("a clip norm squared", FLAT, "self.clip_norm", "self.clip_norm**2", tests=(_LAW,)),
    of_clipping("a clip norm of the norm's square root", FLAT, "norms).clamp_max(1)", "norms.sqrt()).clamp_max(1)", tests=(_LAW,)),
    of_clipping("clipping by the norms' mean", MEASURED, _NORMS, f"{_NORMS}; norms = norms.mean().expand_as(norms).clone()",
                tests=(_LAW,), quick=True),
    of_clipping("clipping by the largest norm", MEASURED, _NORMS, f"{_NORMS}; norms = norms.amax().expand_as(norms).clone()",
                tests=(_LAW,)),
    of_clipping("clipping after the sum", MEASURED, _NORMS, f"{_NORMS}; norms = norms.sum().expand_as(norms).clone()", tests=(_LAW,)),
    of_clipping("a mean taken for a sum", MEASURED, _NORMS, _NORMS.removesuffix(" * scale"), step="familiar",
                tests=("tests/dpopt/test_engine.py", "tests/dpopt/compatibility/test_opacus_parity.py")),
    of_clipping("norms of the last tensor alone", f"{at.CLIPPING}._squares", "return list(squares.values())",
                "return list(squares.values())[-1:]", tests=(_LAW,), quick=True),
    of_clipping("weights in place of biases", f"{at.CLIPPING}._squares", "return list(squares.values())",
                "return [s for n, s in squares.items() if 'bias' not in n] or list(squares.values())", tests=(_LAW,)),
    of_clipping("two passes, norms of the first tensor alone", f"{at.TWO_PASS}:Measuring.complete",
                "measured(squares, row, num_examples)", "measured(squares[:1], row, num_examples)", step="two passes", tests=(_LAW,)),
    of_clipping("the largest group for all groups", f"{at.STEP}.clipped", "math.hypot(*(group.sensitivity for group in groups))",
                "max(group.sensitivity for group in groups)", step="per layer",
                tests=("tests/dpopt/release/test_step_guarantees.py::test_guarantee_release_is_the_charged_mechanism_for_group_clippers",),
                quick=True),
    of_clipping("groups that each get the whole norm", "clipping.clippers.groups:_shared", "clip_norm / math.sqrt(max(1, len(groups)))",
                "clip_norm", step="per layer", checks=(*SENSITIVITY, "noise scale"),
                tests=("tests/clipping/clippers/test_groups.py", "tests/dpopt/release/test_step_guarantees.py")),
    of_clipping("a group clipper that says less", f"{at.GROUPS}.sensitivity", "math.hypot(*self.clip_norms)",
                "max(self.clip_norms)", step="", tests=("tests/clipping/clippers/test_groups.py", _LAW)),
    of_clipping("what is not finite is kept", MEASURED, "real = torch.isfinite(norms)", "real = torch.ones_like(norms, dtype=torch.bool); norms = norms.nan_to_num(1, 1, 1)",
                checks=HOSTILE, tests=(_LAW,), quick=True),
    of_clipping("zero times what is not a number", at.MASKED, "return None if bool(keep.all()) else keep", "return None",
                checks=HOSTILE, tests=(_LAW,)),
    of_clipping("weights rounded up", at.QUOTIENT, "(1 - 4 *", "(1 + 64 *", step="",
                tests=("tests/clipping/clippers/test_clippers.py",)),
    of_clipping("a sum kept in sixteen bits", f"{at.SUMS}.add", "total = _weighted_sum(grads, weights, self.totals.get(key), self.space)",
                "total = _weighted_sum(grads, weights, self.totals.get(key), self.space).bfloat16().float()",
                checks=SENSITIVITY, tests=(_LAW, "tests/dpopt/release/test_step_guarantees.py")),
    of_clipping("a tied weight without its cross term", f"{at.TIED}.norms", "combinations(range(len(self.parts)), 2)", "()",
                step="tied", tests=("tests/clipping/step/test_step_attacks.py::test_guarantee_a_tied_sum_that_cancels_is_measured", "tests/clipping/rules/test_oracle.py")),
    of_clipping("a word twice is measured as two words", f"{at.ROWS}.norms", "return rounded_up(row_norm(sums), self.forming(segment))",
                "return Norms(row_sq_norm(values))", step="tied",
                tests=("tests/clipping/step/test_step_attacks.py", "tests/clipping/gradients/test_sample_grads.py")),
    of_clipping("positions measured one by one", f"{at.OUTER}.norms", "if num_positions * (num_out + num_in) <= num_out * num_in:",
                "if num_positions > 1:\n        return Norms((row_sq_norm(widen(self.left).flatten(0, 2)) * row_sq_norm(widen(self.right).flatten(0, 2))).view(self.num_examples, -1).sum(1))\n"
                "    if False:", step="tied", tests=("tests/clipping/gradients/test_sample_grads.py", "tests/clipping/rules/test_oracle.py")),
    of_clipping("the last use of a tied weight alone", "clipping.gradients.sum:add", "return Sum((first, second)) if merged is None else merged",
                "return second if merged is None else merged", step="", tests=("tests/clipping/rules/test_oracle.py", "tests/clipping/gradients/test_sample_grads.py")),
    of_clipping("divided by the drawn batch", f"{at.TRAINING}.release", "size, audit = self.sampling.expected_batch_size, self._audit",
                "size, audit = float(self.sum.num_drawn or 1), self._audit", tests=("tests/dpopt/release/test_step_guarantees.py",), quick=True),
    of_clipping("divided by the rows that came", f"{at.TRAINING}.release", "size, audit = self.sampling.expected_batch_size, self._audit",
                "size, audit = float(max(1, self.sum.num_added)), self._audit", tests=("tests/dpopt/release/test_step_guarantees.py",)),
    of_clipping("padding that counts", MEASURED, "real &= self.keep.to(norms.device)", "pass", step="",
                tests=("tests/dpopt/sampling/test_sampled_runs.py::test_guarantee_a_padded_row_adds_nothing",)),
    of_clipping("the stand-in of an empty draw counts", f"{at.STEP}._collector", "if self.blank:", "if False:", step="",
                tests=("tests/dpopt/release/test_blank_draws.py",)),
    of_clipping("a record may come twice", f"{at.ADMISSION}.admit", "if self.num_added + counted > (self.num_drawn or 0):", "if False:",
                step="", tests=("tests/dpopt/test_training_refusals.py", "tests/clipping/collectors/test_one_pass.py", "tests/dpopt/test_same_examples.py")),
    of_clipping("what was given up stays in the sum", f"{at.STEP}._forget", "self.sums.totals.clear()", "pass", step="",
                tests=("tests/dpopt/test_training.py", "tests/dpopt/test_training_refusals.py", "tests/dpopt/user_programs/test_loops.py")),
    of_clipping("a part of a failed backward is released", f"{at.ADMISSION}.require_whole", "if self.unfinished:", "if False:", step="",
                tests=("tests/dpopt/test_training_refusals.py", "tests/dpopt/test_same_examples.py", "tests/clipping/collectors/test_one_pass.py")),
    of_clipping("a count that costs nothing", f"{at.QUANTILE}.sensitivity", "return 0.5", "return 1e-6", step="",
                tests=("tests/dpopt/estimators/test_estimator_guarantees.py::test_guarantee_the_count_is_paid_for", _CONTRIBUTIONS)),
    of_clipping("counts that leave the ball", f"{at.RANGES}.heights", "math.sqrt(self.clip_norm**2 - edge**2)", "self.clip_norm", step="",
                tests=("tests/clipping/contributions/test_contributions.py::test_guarantee_gradient_and_slack_stay_within_the_clip_norm",)),
    of_clipping("buffers that follow the batch", f"{at.UNCHANGED}:refuse_changed_buffers", "if changed:", "if False:",
                step="averaging", checks=("buffers",), tests=("tests/dpopt/release/test_step_guarantees.py",), quick=True),
    Mutation("batch normalisation is let through", "clipping", (
        Edit("clipping.validators.examine:refuse_by_list", "faults = listed_faults(model)", "return"),
        *CHECK_LOSSES[1:], Edit(f"{at.UNCHANGED}:refuse_changed_buffers", "if changed:", "if False:")),
        "", (), _REFUSALS),
    of_clipping("parameters that were added later", f"{at.UNCHANGED}:refuse_changed_parameters", "if odd:", "if False:", step="",
                tests=("tests/dpopt/release/test_step_guarantees.py", "tests/dpopt/test_training_refusals.py")),
    of_clipping("public and private gradients together", f"{at.ADMISSION}.require_none_pending", "if self.num_added > 0:", "if False:",
                step="", tests=("tests/dpopt/user_programs/test_public_examples.py",)),
    of_clipping("users of any number of records", f"{at.USERS}.of", "if len(held) < max_records:", "if True:", step="",
                tests=("tests/dpopt/sampling/test_samplers.py::test_guarantee_users_come_whole_and_within_the_cap",)),
    *(coupled(name, quick=name == "contrastive") for name in ("contrastive", "mean over tokens", "weights of the batch", "batch statistics", "ranking")),
)  # fmt: skip
