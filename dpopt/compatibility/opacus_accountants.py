# SPDX-License-Identifier: Apache-2.0
"""Accountants in the shape of Opacus': of a run's ledger, and of a history that a script keeps itself.

A history is a list of (noise multiplier, sampling rate, number of steps), all of them Poisson-sampled Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from accountants import Composed, Event, Gaussian, PoissonSampled, Repeated
from accountants import accountant as find_accountant
from accountants.calibrate import noise_multiplier as calibrate
from dpopt.budget.budget import tightened
from dpopt.public_numbers import check_real
from dpopt.training import PrivateTraining

History = list[tuple[float, float, int]]


class LedgerAccountant:
    """What is on the ledger of a run, as Opacus' `engine.accountant` tells it. Only releases add to it."""

    def __init__(self, name: str, training: Callable[[], PrivateTraining | None]) -> None:
        self._name = name
        self._training = training

    @property
    def history(self) -> History:
        """(noise multiplier, sampling rate, steps) of everything charged so far, in the order of first charges.

        Raises:
            ValueError: something else than Poisson-sampled Gaussians was charged.
        """
        training = self._training()
        return [] if training is None else history_of(training.ledger.events())

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None) -> float:
        """Upper bound on epsilon of everything on the ledger at `delta`.

        `alphas`, orders of Renyi divergences, change nothing: the bound is taken over all orders that the accountant
        knows, or needs none.
        """
        check_orders(alphas)
        training = self._training()
        if training is None:
            raise RuntimeError(
                "expected an engine in use; got one before make_private; call make_private first"
            )
        return training.epsilon(delta)

    def mechanism(self) -> str:
        """The name of the accountant."""
        return self._name

    def __len__(self) -> int:
        """The entries of the history."""
        return len(self.history)

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Refused: a step is charged by its release, before the noise is drawn, and not again."""
        raise RuntimeError(
            "expected steps to be charged by optimizer.step() alone; got accountant.step(), which would count one that "
            "released nothing; leave it out, or keep a history of your own: dpopt.opacus.create_accountant('rdp')"
        )

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Optimizer], None]:
        """A hook for `optimizer.attach_step_hook` that does nothing: the ledger has charged the step already."""
        return lambda optimizer: None

    def state_dict(self) -> dict[str, object]:
        """History and name, to look at: what is spent is kept by the ledger. No history for other samplers."""
        try:
            return {"history": self.history, "mechanism": self._name}
        except ValueError:
            return {"mechanism": self._name}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Refused: what is spent stays spent, whatever a checkpoint remembers."""
        raise RuntimeError(
            "expected a ledger to go on with; got the state of an accountant, which would forget what was spent since; "
            "make the engine on the ledger, PrivacyEngine(ledger=...), and use engine.load_checkpoint(...)"
        )


class HistoryAccountant:
    """Prices a history that the caller keeps: nothing ties it to what ran.

    Args:
        name: one of `accountants`' names.
    """

    def __init__(self, name: str) -> None:
        find_accountant(name)
        self._name = name
        self.history: History = []

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Add one step."""
        noise, rate, count = self.history[-1] if self.history else (None, None, 0)
        if (noise, rate) == (noise_multiplier, sample_rate):
            self.history[-1] = (noise_multiplier, sample_rate, count + 1)
        else:
            self.history.append((noise_multiplier, sample_rate, 1))

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None) -> float:
        """Upper bound on epsilon of the history at `delta`; 0 for none. `alphas` change nothing."""
        check_orders(alphas)
        return find_accountant(self._name).curve(_event_of(self.history)).epsilon(delta)

    def mechanism(self) -> str:
        """The name of the accountant."""
        return self._name

    def __len__(self) -> int:
        """The entries of the history."""
        return len(self.history)

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """A hook for `optimizer.attach_step_hook` that adds each step of that optimizer to the history."""
        return lambda optimizer: self.step(
            noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate
        )

    def state_dict(self) -> dict[str, object]:
        """History and name."""
        return {"history": list(self.history), "mechanism": self._name}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the history of another accountant of this name."""
        if set(state_dict) != {"history", "mechanism"} or state_dict["mechanism"] != self._name:
            raise ValueError(
                f"expected the state of an accountant called {self._name!r}; got {dict(state_dict)}; load what its own "
                "state_dict() gave"
            )
        self.history = [
            (float(noise), float(rate), int(steps)) for noise, rate, steps in state_dict["history"]
        ]


def create_accountant(mechanism: str) -> HistoryAccountant:
    """An empty history that the accountant `mechanism` prices: "rdp", "prv", or another of `accountants`' names."""
    refuse_gdp(mechanism)
    return HistoryAccountant(mechanism)


def RDPAccountant() -> HistoryAccountant:
    """An empty history, priced by Renyi divergences."""
    return HistoryAccountant("rdp")


def PRVAccountant() -> HistoryAccountant:
    """An empty history, priced by privacy loss random variables, at the upper end of the error."""
    return HistoryAccountant("prv")


def GaussianAccountant() -> HistoryAccountant:
    """Refused: see `refuse_gdp`."""
    return create_accountant("gdp")


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    epochs: float | None = None,
    steps: int | None = None,
    accountant: str = "rdp",
    epsilon_tolerance: float | None = None,
) -> float:
    """The least noise multiplier that keeps `steps` steps, or `epochs` epochs, within the target.

    Args:
        target_epsilon: the target, > 0.
        target_delta: its delta.
        sample_rate: the probability with which a record takes part in a step.
        epochs: expected passes over the data: epochs / sample_rate steps.
        steps: or the number of steps.
        accountant: its name.
        epsilon_tolerance: how far below the target the result may end (default: within 0.5 % of the least noise).

    Raises:
        ValueError: not one of steps and epochs is given, or no noise meets the target.
    """
    refuse_gdp(accountant)
    if (steps is None) == (epochs is None):
        raise ValueError("expected steps or epochs; got both or neither; say one of them")
    count = int(epochs / sample_rate) if steps is None and epochs is not None else steps
    assert count is not None
    found = calibrate(
        epsilon=target_epsilon, delta=target_delta, sampling_rate=sample_rate, steps=count, accountant=accountant
    )  # fmt: skip

    def price(noise: float) -> float:
        event = Repeated(PoissonSampled(sample_rate, Gaussian(noise)), count)
        return find_accountant(accountant).curve(event).epsilon(target_delta)

    return found if epsilon_tolerance is None else tightened(price, found, target_epsilon, epsilon_tolerance)


def refuse_gdp(name: str) -> None:
    """Refuse the one accountant of Opacus that gives no bound.

    Raises:
        ValueError: it is "gdp".
    """
    if name == "gdp":
        raise ValueError(
            "expected an accountant whose epsilon is an upper bound; got 'gdp', the central limit of many steps, which lies "
            "below the true epsilon of any finite number of them; use 'pld' or 'prv', which are as tight, or 'rdp'"
        )


def check_orders(alphas: Sequence[float] | None) -> None:
    """Refuse orders of Renyi divergences that are none."""
    for alpha in alphas or ():
        check_real("alphas", alpha)
        if not (alpha > 1 and not math.isnan(alpha)):
            raise ValueError(f"expected orders alphas > 1; got {alpha}; leave them out: all orders are tried")


def history_of(events: Composed) -> History:
    """The entries of an event of Poisson-sampled Gaussians, in order.

    Raises:
        ValueError: there is another kind of event in it.
    """
    found: History = []
    for repeated in events.events:
        step, count = repeated, 1
        while isinstance(step, Repeated):
            step, count = step.event, step.count * count
        if not (isinstance(step, PoissonSampled) and isinstance(step.event, Gaussian)):
            raise ValueError(
                f"expected Poisson-sampled Gaussian steps, which a history of Opacus can hold; got {step}; read "
                "engine.training.ledger.events() instead"
            )
        found.append((step.event.noise_multiplier, step.sampling_rate, count))
    return found


def _event_of(history: History) -> Event:
    steps = [Repeated(PoissonSampled(rate, Gaussian(noise)), count) for noise, rate, count in history]
    return Composed(tuple(steps))
