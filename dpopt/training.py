# SPDX-License-Identifier: Apache-2.0
"""The explicit door: draw a batch, accumulate per-example losses, release, and step any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from accountants import ADD_REMOVE, Bound, Event, Ledger, accountant
from clipping import Clipper, Costs, examine, explained, measured
from clipping.gradients.path_costs import DEFAULT
from clipping.loss_checks import LossChecks, LossReport
from clipping.step.step_sum import StepSum
from clipping.step.two_points import add_difference
from clipping.validators.examine import model_inputs
from dpopt.budget.account import Account
from dpopt.budget.budget import Budget, require_small_delta
from dpopt.budget.declaration import accountant_of, configuration
from dpopt.budget.filtered import AdaptiveBudget, FilteredPayments
from dpopt.budget.ledger_files import SharedLedger
from dpopt.budget.payments import Draw, Payments, require_variable
from dpopt.budget.prices import Priced, Prices, prices, require_priced
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.plain import only_estimator
from dpopt.estimators.step_mechanism import mechanism_of, scaled
from dpopt.guards.model_watch import Watch, refuse_closed, refuse_distributed
from dpopt.guards.open_runs import refuse_open
from dpopt.losses import one_loss
from dpopt.mechanisms import GaussianMechanism, Mechanism
from dpopt.release.randomness_tiers import Tier, fresh_tier
from dpopt.release.release import release
from dpopt.release.write_gradients import times, write_gradients
from dpopt.sampling.registry import population
from dpopt.sampling.sampler import Batch, Records, Sampling
from dpopt.sampling.users import require_users, unit_of

if TYPE_CHECKING:
    from dpopt.audit import Canaries, Evidence
    from dpopt.audit.canaries.audited import Audited


class PrivateTraining:
    """A training run whose every released gradient is clipped, charged, noised, and only then written.

    `clipper` or an `estimator` (`dpopt.estimators`; the run takes a fresh one of its numbers), `mechanism` and `sampling`
    fix what one step releases; `budget` caps the whole ledger, a path (default: a new file under `privacy-ledgers/`,
    printed); with an `AdaptiveBudget`, `mechanism` may be set anew from what was released. `relation` says which datasets are neighbours, one of `accountants.RELATIONS`, and `unit` what a record is.
    A run that continues a ledger is refused under another configuration than that of the last, unless
    `new_configuration` says that it is meant. `accountant_name` is one of `accountants.registry` (default: that of the
    ledger's last run, else "pld").
    `randomness` is "fast" or "secure" (`dpopt.release.randomness_tiers`); `insecure_seed` makes a run repeatable and *not private*.
    `example_inputs` (at least 2 examples, as the model takes them) let the numerical probe run at construction;
    without them it runs on batches 1, 2, 10, 100, ... only. It sees gradients between examples, not a loss divided
    by a number that depends on the batch, such as its token count. `mean_losses` is for callers that send back the
    mean of the losses themselves (the familiar door). `sum_gradients` writes the noisy sum itself, not divided by the
    expected batch size. `two_pass` runs two backwards on each loss and holds no
    layer's gradients: for checkpointed models, where one flat backward would hold every layer again; elsewhere it
    saves nothing. It takes half a step to a step more. `costs` decide how each layer's norm and sum are computed
    (default: measured once on the model's device); `explain()` tells what was chosen. `audit` are canaries, made-up
    records that are drawn, clipped, noised and paid for like the others: `sampling` is then that of a longer data set, and
    `evidence` is what the run leaked of them, once it has ended (`dpopt.audit`).

        with PrivateTraining(model, clipper=FlatClipper(1.0), mechanism=GaussianMechanism(0.8),
                             sampling=poisson(num_records=len(data), batch_size=256)) as private:
            for batch in private.batches(data, steps=100):
                for part in batch.split(32):
                    private.accumulate(losses(model, part))      # shape (B,)
                private.release()                                # charge, noise, write p.grad
                optimizer.step()

    Guarantees
    ----------
    The sequence of gradients written by `release` is the composition of the charged events under `relation`: each
    step is a mechanism of sensitivity `clipper.sensitivity` on a draw of `sampling`, divided by a public constant
    (test_guarantee_release_is_the_charged_mechanism). The charge is on disk before the noise is drawn
    (test_guarantee_charge_is_durable_before_noise). A refused release leaves neither a charge nor a gradient
    (test_guarantee_refusal_releases_nothing).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        clipper: Clipper | None = None,
        estimator: Estimator | None = None,
        mechanism: Mechanism,
        sampling: Sampling,
        budget: Budget | AdaptiveBudget | None = None,
        ledger: str | Path | SharedLedger | None = None,
        accountant_name: str | None = None,
        unit: str | None = None,
        relation: str = ADD_REMOVE,
        example_inputs: Tensor | tuple | Mapping[str, object] | None = None,
        batch_dim: int = 0,
        mean_losses: bool = False,
        sum_gradients: bool = False,
        two_pass: bool = False,
        costs: Costs | None = None,
        randomness: str = "fast",
        insecure_seed: int | None = None,
        new_configuration: bool = False,
        audit: Canaries | None = None,
    ) -> None:
        refuse_distributed()
        sampling = sampling if audit is None else audit.widened(sampling)
        if budget is not None:
            require_small_delta(budget, population(sampling))
        examine(model, model_inputs(example_inputs, model), batch_dim=batch_dim)
        self.model = model
        self.mechanism = mechanism
        self.sampling = sampling
        self.insecure_seed = insecure_seed
        self.steps = 0
        self.accountant = accountant(accountant_name or accountant_of(ledger), relation)
        self._account = Account.at(
            ledger,
            unit=unit or unit_of(sampling),
            relation=relation,
            rule=self.accountant,
            budget=budget,
            new_configuration=new_configuration,
        )
        if costs is None:  # measured costs may choose otherwise in another run, and round otherwise
            costs = DEFAULT if insecure_seed is not None else measured(next(model.parameters()).device)
        self.estimator = only_estimator(clipper, estimator).fresh()
        require_priced(self.estimator, relation)
        self._stage = self.estimator.stage(0)
        self._clipper = self._stage.contribution.clipper
        self.sum = StepSum(
            model,
            self._stage.contribution,
            mean=mean_losses,
            batch_dim=batch_dim,
            two_pass=two_pass,
            costs=costs,
        )
        self._begun: int | None = None
        self._priced: Priced | None = None
        self._payments: Payments | FilteredPayments | None = None
        self._drawn_by = sampling
        self._randomness = randomness
        self._tier = self._new_tier()
        self._factor = sampling.expected_batch_size if sum_gradients else 1.0
        self._check_mechanism()
        scaled(mechanism_of(self.estimator, mechanism, 0), math.sqrt(self._stage.rounds))
        self._audit = (
            None if audit is None else _audited(audit, sampling, self.estimator, mechanism, self.sum)
        )
        self.accountant.curve(self.event)  # refuses what has no price under this relation
        self.noise_stds: dict[str, float] = {}
        """The standard deviation of the noise in each `.grad` of the last release; empty where it is of several."""
        self._open = False
        self._dataset: Sized | None = None
        self._watch = Watch(model, self.sum)
        self.order = self._watch.order

    def __enter__(self) -> PrivateTraining:
        """Open the ledger, check the budget, clear every `.grad` and start recording."""
        refuse_open(self.model)
        self._begun = None
        self._drawn_by = self.sampling
        if self._account.was_open:
            # Charges number the noise, and a ledger that was put back or taken away counts them again.
            self._tier = self._new_tier()
            self._dataset = None
            self.estimator = self.estimator.fresh()  # what is hidden was priced for one run
        told = None if self._audit is None else self._audit.toss(self._tier)
        ledger = self._account.open(self._prices.at(0))
        try:
            config = self._configuration() | ({} if told is None else {"audit": told})
            self._account.begin(ledger, config, self._prices, self.sampling.steps_per_charge)
            if self._audit is not None:
                self._audit.begin(self._account.path, ledger.num_charges)
            self._watch.attach(partial(self.__exit__, None, None, None))
        except BaseException:
            self._account.give_up(ledger)
            raise
        self._open, self._payments = True, self._account.payments
        self._account.tell()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording, drop what was not released, close the ledger; no hook or attribute stays behind."""
        self._open = False
        self._watch.detach()
        if self.sum.checks is not None:
            self.sum.checks.detach()
        self.sum.end()
        self._account.close()
        if self._audit is not None:
            self._audit.close(self._account.path)

    def __deepcopy__(self, memo: dict[int, object]) -> PrivateTraining:
        """The run itself, for copies of what holds it: a ledger has one writer."""
        return self

    @property
    def is_open(self) -> bool:
        """Whether the run has begun and not ended."""
        return self._open

    @property
    def ledger(self) -> Ledger:
        """The open ledger of this run."""
        return self._account.ledger

    @property
    def ledger_path(self) -> Path:
        """Where it is."""
        return self._account.path

    @property
    def payments(self) -> Payments | FilteredPayments:
        """The rounds of this run, and what was paid for them."""
        return self._account.payments if self._payments is None else self._payments

    @property
    def event(self) -> Event:
        """What the next charge pays for, a step or a whole round: from the sampler and the mechanism that run."""
        known = self._prices
        if self._priced is not None and self._priced.every is not None:
            return self._priced.every
        return known.at(0 if self._payments is None else self._payments.number(self._begun))

    @property
    def _prices(self) -> Prices:
        """What the charges cost, from the parts that run now: asked again where one was exchanged, or can change."""
        parts = (self.estimator, self.sampling, self.mechanism)
        if self._priced is None or any(a is not b for a, b in zip(parts, self._priced.parts, strict=True)):
            self._priced = Priced.of(*parts)
        return self._priced.prices if self._priced.fixed else prices(*parts)

    def bound(self, delta: float) -> Bound:
        """Upper bound on epsilon of everything on the ledger so far, with its method and assumptions."""
        return self._account.bound(delta)

    def epsilon(self, delta: float) -> float:
        """Upper bound on epsilon of everything on the ledger so far; infinite without noise."""
        return self.bound(delta).epsilon

    @property
    def steps_left(self) -> int | None:
        """Releases that the budget still affords; None without a budget."""
        return self.payments.steps_left if self._account.was_open else None

    def draw(self, num_records: int) -> Draw:
        """The next batch: its indices, and its number."""
        if not self._open:
            refuse_closed()
        self._require_sampling()
        rounds = self.payments.rounds
        number = rounds.next(num_records)
        more = 0 if self._audit is None else self._audit.num_places
        drawn = self._tier.draw(self.sampling, num_records + more, *rounds.place(number))
        return Draw(drawn if self._audit is None else self._audit.part(number, drawn, num_records), number)

    def begin(self, number: int, num_drawn: int, records: Sequence[int] | None = None) -> None:
        """Open the step of draw `number`, which holds `num_drawn` examples; a draw passed over is not released.

        `records` are its indices, for estimators that remember each record.
        """
        payments = self.payments
        payments.rounds.require_open(number)
        charge = payments.number(number)
        stage = self.estimator.stage(self.steps if payments.rounds.length > 1 else charge)
        self.sum.begin(
            num_drawn,
            stage.contribution,
            records,
            repeats=stage.rounds,
            two_points=stage.previous is not None,
        )
        self._begun, self._stage = number, stage
        if self._audit is not None:
            self._audit.start(number)

    def batches(
        self, dataset: Records[object] | Sequence[object], *, steps: int | None = None
    ) -> Iterator[Batch]:
        """Draw `steps` batches of `dataset` (default: all that the budget affords); release each before the next."""
        require_users(self.sampling, dataset)
        self._require_places(dataset)
        items = self.joined(dataset)
        for _ in range(self.payments.settled(steps, self.steps)):
            draw = self.draw(len(dataset))
            self.begin(draw.number, len(draw.indices), draw.indices)
            yield Batch(tuple(items[i] for i in draw.indices), tuple(draw.indices))
            self.sum.admission.require_ended()

    def joined(self, dataset: Records[object]) -> Records[object]:
        """The data set, with the items of input canaries behind it where the run is audited with such."""
        return dataset if self._audit is None else self._audit.joined(dataset)

    def _require_places(self, dataset: Sized) -> None:
        known = self._stage.contribution.num_records
        if known is None:
            return
        if len(dataset) != known or (self._dataset is not None and self._dataset is not dataset):
            raise ValueError(
                f"expected the one dataset of {known} records whose places the estimator remembers; got another one; use a "
                "run of its own for it"
            )
        self._dataset = dataset

    def accumulate(
        self,
        *losses: Tensor,
        keep: Sequence[bool] | Tensor | None = None,
        records: Sequence[int] | None = None,
    ) -> None:
        """Run the backward of per-example losses (B,) and add the clipped gradients to this step.

        Costs nothing and releases nothing; call it for any number of micro-batches. Several losses of the same
        B examples (a discriminator's on real and on made-up inputs) are one loss: their sum is clipped. Rows
        outside `keep`, one flag for each, add exactly nothing and are no drawn examples: see `Batch.padded`.
        `records` tells which record each row is, for estimators that remember each one: the `indices` of a part.
        """
        summed = one_loss(losses)
        if summed.shape[0] > 0:
            self.sum.add(summed, keep, records)

    def evaluate(
        self,
        losses: Callable[[], Tensor],
        *,
        keep: Sequence[bool] | Tensor | None = None,
        records: Sequence[int] | None = None,
    ) -> None:
        """`accumulate` what `losses` returns, called as often as the estimator needs: at other parameters too.

        The one way for an estimator of differences of gradients, and the same as `accumulate` for the others.
        """
        if self._stage.previous is None:
            self.accumulate(losses(), keep=keep, records=records)
        else:
            add_difference(self.sum, lambda: one_loss((losses(),)), self._stage.previous, keep, records)

    def same_examples(self) -> AbstractContextManager[None]:
        """A block of several backwards of the same B examples, merged and clipped together once at its end.

        Row i of each backward must be example i: the losses of a discriminator on real and on made-up inputs, say.
        Another number of rows raises ValueError; where the block raises, nothing is counted. The merged
        gradients are held until the end of the block, under per-layer clipping and `two_pass` too.
        """
        return self.sum.same_examples()

    def paused(self) -> AbstractContextManager[None]:
        """A block in which the model's parameters are constants: gradients reach its inputs, nothing is recorded.

        For the generator of a GAN, which learns through the private discriminator; inside or outside a step.
        Run forward and backward in the block.

        Guarantees
        ----------
        No private parameter gets a gradient and no example is counted, so the block releases nothing by itself
        (test_guarantee_a_paused_backward_reaches_inputs_only). Not protected: the gradients that other modules get.
        They are free where the inputs are public or made from released parameters and noise alone, as a
        generator's samples are; where the inputs are private examples, these gradients tell about them.
        """
        return self.sum.tape.paused()

    @contextmanager
    def public_examples(self) -> Iterator[None]:
        """A block in which the model is an ordinary one, for steps on public examples between private ones.

        Autograd writes gradients as it always does, and any optimizer steps on them: no charge, no clipping, no noise.
        What is run in the block is declared public by whoever runs it, and nothing can check that: an example of
        the private dataset there would be released as it is. `.grad` is added to as usual: zero it first, unless
        the gradient that was released last is meant to be part of the step.

        Raises RuntimeError where private gradients are pending, or buffers were changed by a private forward.

        Guarantees
        ----------
        Given the releases before it, what the block does is a function of public examples alone: it is post-processing,
        and costs nothing. No gradient of a private example enters it: none is pending when it begins, and a
        forward from outside cannot be sent back inside, nor one from before it afterwards
        (test_guarantee_public_examples_and_private_ones_never_share_a_step).

            with private.public_examples():
                optimizer.zero_grad()
                criterion(model(public_inputs), public_labels).backward()
                optimizer.step()
        """
        if not self._open:
            refuse_closed()
        self.noise_stds = dict.fromkeys(self.sum.parameters, 0.0)
        with self._watch.public_examples():
            yield

    @property
    def loss_report(self) -> LossReport:
        """Which checks the losses of this run have passed, where they are checked; it can be printed."""
        return LossReport(0, 0, 0, 0) if self.sum.checks is None else self.sum.checks.report

    def check_losses(self) -> None:
        """Look at every backward before it begins, as the familiar door does: see `clipping.loss_checks`."""
        step = self.sum
        step.checks = LossChecks(
            step.tape,
            mean=step.sums.mean,
            whole=getattr(self.sampling, "sampling_rate", 0) == 1,
            ready=step.expects_losses,
        ).attach()

    def explain(self) -> str:
        """A table of the layers: how each parameter's norm and sum were computed last, and why. Public numbers."""
        return explained(self.sum.sums)

    def discard(self) -> None:
        """Drop what this step accumulated, to run the same batch again (after an out-of-memory error, say)."""
        self.sum.discard()

    def release(self) -> None:
        """Charge the step, add the noise, write every `.grad`, and end the step.

        Raises `BudgetExhausted` before anything is charged. If the process dies after the charge, the step
        stays paid for and nothing was released.
        """
        draw = self._check_release()
        mechanism = self.mechanism
        if self.estimator.allocation is not None or self.estimator.factors is not None:
            mechanism = mechanism_of(self.estimator, mechanism, self.payments.number(draw))
        record = self.payments.pay(draw, self.steps + 1)
        self.steps += 1
        self.payments.rounds.close(draw)
        try:
            # The record's own number is the domain: whatever is tried again pays again, and gets other noise.
            size, audit = self.sampling.expected_batch_size, self._audit
            seen = None if audit is None else audit.join()
            released = release(self._stage, self.sum, mechanism, self._tier, record.seq, size, seen)
            if audit is not None:
                audit.end_step()
            parameters = self.sum.tape.parameters
            write_gradients(parameters, times(released.gradient, self._factor))
            told = released.stds if self._stage.direct else {}
            self.noise_stds = {name: std * self._factor for name, std in told.items() if name in parameters}
        finally:
            self.sum.end()

    def vary(self, *, noise_multiplier: float | None = None, estimator: Estimator | None = None) -> None:
        """Go on with another noise multiplier from now on, or another estimator from the next step on.

        For schedules that are public and fixed before the data are seen; a choice that looks at what was released is
        beyond every bound except a filter's.

        Args:
            noise_multiplier: noise standard deviation over sensitivity, > 0.
            estimator: of the same model, e.g. with another clip norm.

        Raises:
            ValueError: there is a budget, whose noise was settled for the whole run, or a charge pays for several steps.

        Guarantees
        ----------
        Each step is charged with the noise that it gets (test_guarantee_a_varied_step_is_charged_with_its_own_noise).
        """
        if noise_multiplier is not None:
            require_variable(self.payments.budget, self.sampling, noise_multiplier)
            self.mechanism = GaussianMechanism(noise_multiplier)
            self._check_mechanism()
            self.payments.settle(self._prices)
        if estimator is not None:
            self.estimator = estimator.fresh()

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What an audited run leaked of its canaries, the most direct first; once it has ended.

        Raises:
            RuntimeError: the run is open, has released nothing, or has no audit.
        """
        found = None if self._audit is None or self._open else self._audit.evidence
        if found is None:
            raise RuntimeError(
                "expected an audited run that has ended; got one that is open, released nothing or has no audit, whose coins "
                "are not opened; pass audit=Canaries(1000), and ask after the `with` statement"
            )
        return found

    def note_buffers(self) -> None:
        """Take the model's buffers as they are for public, when a public checkpoint was loaded: they may differ."""
        self._watch.note_buffers()

    def go_on(self, estimator: Estimator) -> None:
        """Begin in the middle of a schedule that an earlier run of the ledger began; before the first step.

        Args:
            estimator: the run's own, at another place of its schedule.

        Raises:
            RuntimeError: the run has released something.
        """
        if self.payments.rounds.charged:
            raise RuntimeError(
                "expected a run that has released nothing yet; got one that has; load a checkpoint before the first step"
            )
        self.estimator = estimator
        self.payments.settle(self._prices)

    def _check_mechanism(self) -> None:
        bounds, sizes = self.sum.bounds_and_sizes()
        self._tier.check(mechanism_of(self.estimator, self.mechanism, 0), self.sampling, bounds, sizes)

    def _check_release(self) -> int:
        if self.sum.admission.num_drawn is None or self._begun is None:
            raise RuntimeError(
                "expected a batch drawn since the last release; got none; take one from batches(...) first"
            )
        self._watch.check()
        self._require_sampling()
        self.payments.check(self._begun, self.event, self.steps)
        return self._begun

    def _require_sampling(self) -> None:
        if self.sampling is not self._drawn_by:
            raise RuntimeError(
                f"expected the sampling that the run began with, {self._drawn_by}; got {self.sampling}, whose draws are "
                "priced otherwise; start a run of its own on the same ledger"
            )

    def _new_tier(self) -> Tier:
        return fresh_tier(self._randomness, self.insecure_seed, self.sampling, self.sum.parameters.values())

    def _configuration(self) -> dict[str, object]:
        return configuration(
            event=self._prices.at(0), sampling=self.sampling, mechanism=self.mechanism,
            clipper=self._clipper, estimator=self.estimator.setting,
            accountant=self.accountant.name, randomness=self._randomness, assumptions=self._tier.assumptions,
            budget=self._account.budget, insecure_seed=self.insecure_seed,
        )  # fmt: skip


def _audited(
    canaries: Canaries, sampling: Sampling, estimator: Estimator, mechanism: Mechanism, step: StepSum
) -> Audited:
    from dpopt.audit.canaries.audited import (
        Audited,  # with it come bounds and their statistics, which other runs do not need
    )

    return Audited(canaries, sampling, estimator, mechanism, step)
