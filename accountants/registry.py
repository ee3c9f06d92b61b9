# SPDX-License-Identifier: Apache-2.0
"""The accountants by name. To add one: write its file, add one line here."""

from accountants.curve import Accountant
from accountants.prv import PRV
from accountants.rdp import RDP

ACCOUNTANTS: dict[str, Accountant] = {"prv": PRV(), "rdp": RDP()}


def accountant(name: str) -> Accountant:
    """Return the accountant called `name`: "prv" (tight, seconds) or "rdp" (looser, milliseconds, adaptive).

    Raises:
        ValueError: no accountant has this name. "gdp" in particular: its central limit is no bound.
    """
    if name not in ACCOUNTANTS:
        raise ValueError(
            f"accountant must be one of {sorted(ACCOUNTANTS)}; got {name!r}; choose 'prv' if unsure"
        )
    return ACCOUNTANTS[name]
