# SPDX-License-Identifier: Apache-2.0
"""Bugs between what ran and what is paid: the draws, their price, the ledger, and what a budget still affords."""

from tests.mutations import places as at
from tests.mutations.mutating import Edit, Mutation

_SAMPLERS, _RELATIONS = "tests/dpopt/sampling/test_samplers.py", "tests/accountants/test_relations.py"
_LEDGER, _GOVERNED = (
    "tests/accountants/ledger/test_ledger.py",
    "tests/accountants/ledger/test_governed_ledger.py",
)
_GUARANTEES, _ROUNDS = "tests/dpopt/release/test_step_guarantees.py", "tests/dpopt/budget/test_rounds.py"
_POISSON = (
    "tests/dpopt/sampling/test_poisson.py::test_guarantee_inclusion_is_independent_at_the_stated_rate",
)
DRAW = f"{at.POISSON}.draw"
_CHOSEN = "return torch.nonzero(uniform < self.sampling_rate).flatten().tolist()"


def of_draws(name, place, old, new, checks=(), tests=(), quick=False):
    return Mutation(
        name, "sampling", (Edit(place, old, new),), "explicit" if checks else "", checks, tests, quick
    )


def of_charges(name, place, old, new, *tests):
    return Mutation(name, "accounting", (Edit(place, old, new),), "", (), tests)


BUGS = (
    of_draws("twice the sampling rate", DRAW, "uniform < self", "uniform < 2 * self", ("sampling rate",), _POISSON, True),
    of_draws("a fixed number is drawn and priced as Poisson", DRAW, _CHOSEN,
             "return sorted(torch.argsort(uniform)[: round(self.sampling_rate * num_records)].tolist())",
             ("batch sizes",), _POISSON, True),
    of_draws("blocks of neighbours are drawn and priced as Poisson", DRAW, "uniform < self", "uniform[torch.arange(num_records) // 4 * 4] < self",
             ("batch sizes", "draws independent"), _POISSON, True),
    of_draws("the first half of the records", DRAW, _CHOSEN,
             "return torch.nonzero(uniform[: num_records // 2] < 2 * self.sampling_rate).flatten().tolist()", ("records",), _POISSON),
    of_draws("the last record never", DRAW, "torch.rand(num_records,", "torch.rand(num_records - 1,", ("records", "sampling rate"),
             (*_POISSON, "tests/dpopt/sampling/test_poisson.py")),
    of_draws("the same draw in every step", f"{at.TIER}.draw", '"sampling", number)', '"sampling")', ("draws independent",),
             ("tests/dpopt/sampling/test_sampled_runs.py", "tests/dpopt/test_training.py", "tests/dpopt/test_faults.py"), True),
    of_draws("a cut draw keeps the first", f"{at.TRUNCATED}.draw", "kept = torch.argsort(uniform[drawn])[: self.max_batch_size]",
             "kept = torch.arange(len(drawn))[: self.max_batch_size]", (),
             (f"{_SAMPLERS}::test_guarantee_truncation_keeps_an_even_choice",)),
    of_draws("a cut draw priced as an uncut one", f"{at.TRUNCATED}.event",
             "return TruncatedPoisson(self.sampling_rate, self.max_batch_size, self.num_records, mechanism)",
             "return PoissonSampled(self.sampling_rate, mechanism)", (), (_SAMPLERS, "tests/dpopt/sampling/test_sampled_runs.py")),
    of_draws("half the rate is priced", f"{at.POISSON}.event", "PoissonSampled(self.sampling_rate,", "PoissonSampled(self.sampling_rate / 2,",
             (), (f"{_GUARANTEES}::test_guarantee_release_is_the_charged_mechanism",)),
    of_draws("the rate of a loader without its last batch", f"{at.REQUEST}.sampling", "rate = 1 / len(self.loader)",
             "rate = 1 / (len(self.loader) + 1)", (), ("tests/dpopt/release/test_step_guarantees.py", "tests/dpopt/compatibility/test_opacus_parity.py")),
    of_draws("shuffled batches priced as Poisson", f"{at.SHUFFLED}.event",
             "return OncePerEpoch(self.steps_per_charge, BY_POSITION, mechanism)",
             "return __import__('accountants').PoissonSampled(self.batch_size / self.num_records, mechanism)", (),
             (_SAMPLERS, "tests/dpopt/sampling/test_sampled_runs.py")),
    of_draws("shuffled batches paid by the step alone", f"{at.SHUFFLED}.event", "BY_POSITION", "BY_RECORD", (),
             (_SAMPLERS, "tests/dpopt/sampling/test_sampled_runs.py")),
    of_draws("a bin chosen anew in each step", f"{at.BALLS}.draw", "(uniform * self.num_batches).long() == step",
             "(torch.rand(num_records) * self.num_batches).long() == 0", (), (f"{_SAMPLERS}::test_guarantee_epochs_give_each_record_one_batch",)),
    of_draws("a fixed number with replacement", f"{at.FIXED}.draw", "sorted(torch.argsort(uniform)[: self.batch_size].tolist())",
             "sorted((uniform[: self.batch_size] * num_records).long().tolist())", (), (f"{_SAMPLERS}::test_guarantee_fixed_size_draws_every_subset_alike",)),
    of_charges("relations are ignored for a full batch", f"{at.RELATIONS}:_gaussian", "leaf.noise_multiplier / 2", "leaf.noise_multiplier",
               _RELATIONS, "tests/accountants/test_group.py"),
    of_charges("relations are ignored for Poisson", f"{at.RELATIONS}:_poisson", "if relation == REPLACE", "if False", _RELATIONS,
               "tests/accountants/dominating_pairs/test_replaced_record.py"),
    of_charges("fixed size has a price when records are added", f"{at.RELATIONS}:_fixed_size", "if relation == ADD_REMOVE:", "if False:", _RELATIONS),
    of_charges("a shuffle has a price when records are added", f"{at.RELATIONS}:_once", "if relation == ADD_REMOVE and", "if False and", _RELATIONS,
               "tests/dpopt/sampling/test_samplers.py"),
    of_charges("charges of another relation are priced", f"{at.RELATIONS}:require_charged_under", "if others:", "if False:",
               "tests/accountants/ledger/test_ledger_bound.py", _RELATIONS),
    of_charges("the slip of a cut is free", "accountants.dominating_pairs.truncated_poisson:overflow", "return min(1.0, max(event.sampling_rate * tail * (1 + 1e-9), 1e-300))",
               "return 0.0", "tests/accountants/test_truncation.py", _RELATIONS),
    of_charges("a group costs as one record", f"{at.GROUP}:_grouped", "Gaussian(s / size * (1 - 1e-15))", "Gaussian(s)",
               "tests/accountants/test_group.py"),
    of_charges("a group adds delta once", f"{at.GROUP}:GroupCurve._generic_delta", "math.fsum(math.exp(j * each) for j in range(self.size))",
               "1.0", "tests/accountants/test_group.py"),
    of_charges("a Renyi curve that adds one order less", f"{at.RENYI}.epsilon", "np.log(a * delta) / (a - 1)", "np.log(a * delta) / a",
               "tests/accountants/methods/test_rdp.py", "tests/accountants/test_oracles.py", "tests/accountants/test_known_failures.py"),
    of_charges("composition that takes the largest", f"{at.RENYI}.__add__", "self.values + other.values", "np.maximum(self.values, other.values)",
               "tests/accountants/test_algebra.py", "tests/accountants/methods/test_rdp.py"),
    of_charges("one direction of the neighbours alone", "accountants.methods.pld:_epsilon", "found = _epsilon_of(steps, delta, True, 0.0, looseness)", "return _epsilon_of(steps, delta, False, 0.0, looseness)",
               "tests/accountants/methods/test_pld.py", "tests/accountants/test_oracles.py"),
    Mutation("the ledger is written after the release", "accounting", (
        Edit(f"{at.TRAINING}.release", "record = self.payments.pay(draw, self.steps + 1)", "record = Draw(None, self.steps)"),
        Edit(f"{at.TRAINING}.release", "mechanism, self._tier, record.seq, size", "mechanism, self._tier, record.number, size"),
        Edit(f"{at.TRAINING}.release", "finally:\n", "finally:\n        self.payments.pay(draw, self.steps)\n")),
        "", (), (f"{_GUARANTEES}::test_guarantee_charge_is_durable_before_noise", f"{_GUARANTEES}::test_guarantee_charge_is_durable_before_noise_under_kill")),
    of_charges("a charge that is not synchronised", f"{at.STORAGE}:write_durably", "getattr(os, \"fdatasync\", os.fsync)(fd)", "pass",
               _LEDGER, "tests/dpopt/test_faults.py"),
    of_charges("a charge that costs nothing", f"{at.PAYMENTS}.pay", "if self.rounds.is_paid(draw):", "if True:", _ROUNDS, _GUARANTEES),
    of_charges("an epoch that is paid once for all epochs", f"{at.ROUNDS}.is_paid", "self.place(draw)[0] == self._paid", "self._paid >= 0", _ROUNDS),
    of_charges("a draw may be released twice", f"{at.ROUNDS}.require_open", "if not self.over <= draw < self.drawn:", "if False:", _ROUNDS),
    of_charges("a budget that is not asked", f"{at.PAYMENTS}.check", "if self.budget is not None and", "if False and",
               f"{_GUARANTEES}::test_guarantee_refusal_releases_nothing", "tests/dpopt/budget/test_budget.py"),
    of_charges("a mechanism that changed is charged as before", f"{at.PAYMENTS}.check", "if event != due:", "if False:",
               f"{_GUARANTEES}::test_guarantee_refusal_releases_nothing_when_the_model_changed"),
    of_charges("charges of earlier runs are forgotten", f"{at.PAYMENTS}.settle", "spent = self.ledger.events()",
               "spent = __import__('accountants').Composed(())", "tests/dpopt/budget/test_budget.py", "tests/dpopt/budget/test_resume.py",
               "tests/dpopt/compatibility/test_opacus_runs.py::test_guarantee_runs_on_one_ledger_count_each_others_charges"),
    of_charges("runs that do not see each other's charges", f"{at.PAYMENTS}._follow", "if self.budget is not None and", "if False and",
               "tests/dpopt/compatibility/test_opacus_runs.py::test_guarantee_runs_on_one_ledger_count_each_others_charges", "tests/dpopt/budget/test_budget.py"),
    of_charges("a filter that always has room", f"{at.SPENDING}.has_room", "return self._rule is None or", "return True or",
               "tests/accountants/test_filter.py", _GOVERNED),
    of_charges("direct charges beside a filter", f"{at.LEDGER}._append", "self._spending.require_room(event)", "pass", _GOVERNED),
    of_charges("two filters on one ledger", f"{at.LEDGER}.govern", "if present is not None and (", "if False and (", _GOVERNED,
               "tests/accountants/test_filter_rule.py"),
    of_charges("a filter made after charges", f"{at.FILTER_RULE}:refuse_late", "if num_charges", "if False and num_charges", _GOVERNED,
               "tests/accountants/test_filter_rule.py"),
    of_charges("orders that share more than the whole delta", f"{at.FILTER_RULE}:renyi_rule", "disjoint=name != EVERY", "disjoint=False",
               "tests/accountants/test_filter_rule.py", "tests/accountants/test_filter.py"),
    of_charges("a ledger that was rolled back is known", f"{at.LEDGER}.knows", "return head in self._hashes", "return True", _LEDGER,
               "tests/accountants/ledger/test_ledger_reading.py", "tests/accountants/ledger/test_ledger_identity.py"),
    of_charges("a torn charge is dropped", f"{at.LEDGER}._repair", "if harmless or not fitting:", "if True:", _LEDGER,
               "tests/dpopt/test_faults.py"),
    of_charges("a second writer", "accountants.storage:_lock", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", _LEDGER),
    of_charges("a ledger that was moved away", f"{at.STORAGE}:require_in_place", "if held.st_nlink == 0 or", "if False and", _LEDGER,
               "tests/accountants/ledger/test_ledger_identity.py", "tests/dpopt/test_faults.py"),
    of_charges("a broken chain is read on", f"{at.CHAIN}:Chain._record", "raise self._corrupt(\"its place and hash do not continue the chain\")", "pass", _LEDGER,
               "tests/accountants/ledger/test_ledger_reading.py"),
)  # fmt: skip
