# SPDX-License-Identifier: Apache-2.0
"""The accountants by name. To add one: write its file, add one line here."""

from accountants.curve import Accountant
from accountants.pld import PLD
from accountants.prv import PRV
from accountants.rdp import RDP

ACCOUNTANTS: dict[str, Accountant] = {"pld": PLD(), "prv": PRV(), "rdp": RDP()}


def accountant(name: str) -> Accountant:
    """Return the accountant called `name`.

    "pld": within 0.1 % of the truth as a rule, milliseconds; "prv": within 0.01 in epsilon, seconds, the numbers
    of Opacus; "rdp": 5 to 20 % above the truth, and the only one fit for adaptively chosen parameters.

    Raises:
        ValueError: no accountant has this name. "gdp" in particular: its central limit is no bound.
    """
    if name not in ACCOUNTANTS:
        raise ValueError(
            f"accountant must be one of {sorted(ACCOUNTANTS)}; got {name!r}; choose 'prv' if unsure"
        )
    return ACCOUNTANTS[name]
