# SPDX-License-Identifier: Apache-2.0
"""What does a release cost? Events as data, privacy curves closed under `+`, and a ledger that forgets nothing.

>>> from accountants import Gaussian, PoissonSampled, Repeated, accountant
>>> step = PoissonSampled(0.01, Gaussian(1.0))
>>> round(accountant("rdp").curve(Repeated(step, 1000)).epsilon(1e-5), 2)
2.1
"""

from accountants import calibrate
from accountants.best import AdaptiveSchedule, best
from accountants.curve import Accountant, Bound, Curve
from accountants.events import (
    BY_POSITION,
    BY_RECORD,
    Composed,
    Event,
    FixedSize,
    Gaussian,
    HiddenFeedback,
    Leaf,
    NonPrivate,
    OncePerEpoch,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
    UnpricedEvent,
)
from accountants.filter import BudgetExhausted, Filter, budget_filter, choose_order
from accountants.formats.event_json import from_dict, to_dict
from accountants.group import GroupCurve, group
from accountants.ledger.ledger import Ledger
from accountants.ledger.ledger_bound import ledger_bound
from accountants.nests import leaves
from accountants.records import History, Record, charged, read, verify
from accountants.registry import accountant
from accountants.relations import ADD_REMOVE, RELATIONS, REPLACE, ZERO_OUT
from accountants.storage import LedgerCorrupt, LedgerLocked, LedgerNotDurable

__all__ = [
    "ADD_REMOVE",
    "BY_POSITION",
    "BY_RECORD",
    "RELATIONS",
    "REPLACE",
    "ZERO_OUT",
    "Accountant",
    "AdaptiveSchedule",
    "Bound",
    "BudgetExhausted",
    "Composed",
    "Curve",
    "Event",
    "Filter",
    "FixedSize",
    "Gaussian",
    "GroupCurve",
    "HiddenFeedback",
    "History",
    "Leaf",
    "Ledger",
    "LedgerCorrupt",
    "LedgerLocked",
    "LedgerNotDurable",
    "NonPrivate",
    "OncePerEpoch",
    "PoissonSampled",
    "Record",
    "Repeated",
    "TruncatedPoisson",
    "UnpricedEvent",
    "accountant",
    "best",
    "budget_filter",
    "calibrate",
    "charged",
    "choose_order",
    "from_dict",
    "group",
    "leaves",
    "ledger_bound",
    "read",
    "to_dict",
    "verify",
]
