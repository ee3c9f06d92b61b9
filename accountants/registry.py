# SPDX-License-Identifier: Apache-2.0
"""The accountants by name, each with hidden feedback around it. To add one: write its file, add one line here."""

from collections.abc import Callable, Mapping
from functools import lru_cache

from accountants.curve import Accountant
from accountants.methods.hidden_feedback import FeedbackPricing
from accountants.methods.pld import PLD, RoughPLD
from accountants.methods.prv import PRV
from accountants.methods.rdp import RDP
from accountants.methods.zcdp import ZCDP
from accountants.relations import ADD_REMOVE, check_relation

DEFAULT = "pld"
"""The accountant that is taken where none is named."""

ACCOUNTANTS: Mapping[str, Callable[[str], Accountant]] = {
    "pld": lambda relation: PLD(relation=relation),
    "prv": lambda relation: PRV(relation=relation),
    "rdp": lambda relation: RDP(relation=relation),
    "zcdp": lambda relation: ZCDP(relation=relation),
}


ROUGH: Mapping[str, Callable[[str], Accountant]] = {
    "pld": lambda relation: RoughPLD(relation=relation),
    "prv": lambda relation: RoughPLD(relation=relation),
}
"""What comes near an accountant in less time, where there is something."""


@lru_cache(maxsize=64)
def rough(name: str, relation: str = ADD_REMOVE) -> Accountant:
    """Return an accountant that is near the one called `name` and faster, if there is one: where a search begins."""
    make = ROUGH.get(name)
    return accountant(name, relation) if make is None else FeedbackPricing(make(relation))


@lru_cache(maxsize=64)
def accountant(name: str, relation: str = ADD_REMOVE) -> Accountant:
    """Return the accountant called `name`, for neighbours as in `relations.RELATIONS`.

    "pld", the default everywhere: within 0.1 % of the truth as a rule, milliseconds, both directions; "prv": within 0.01
    in epsilon or as "pld", the numbers of Opacus; "rdp": 5 to 20 % above the truth, fit for adaptively chosen parameters;
    "zcdp": one number for Gaussians on full batches or whole epochs, blind to sampling.

    Raises:
        ValueError: no accountant has this name. "gdp" in particular: its central limit is no bound.
    """
    if name not in ACCOUNTANTS:
        raise ValueError(
            f"accountant must be one of {sorted(ACCOUNTANTS)}; got {name!r}; choose 'pld' if unsure"
        )
    check_relation(relation)
    return FeedbackPricing(ACCOUNTANTS[name](relation))
