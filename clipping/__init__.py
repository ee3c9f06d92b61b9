# SPDX-License-Identifier: Apache-2.0
"""What does one example contribute? Per-example gradients, kept structured, clipped and summed."""

from clipping.clipped import ClippedSum, zero_sum
from clipping.clippers import Clipper, FlatClipper, GroupClipper, per_layer, per_parameter
from clipping.engines import add_clipped
from clipping.errors import MixesExamples, UnrecordedParameter
from clipping.examine import examine, probe, refuse_mixed
from clipping.grads import Dense, SampleGrads
from clipping.outer import Outer
from clipping.rows import Rows
from clipping.rules import Inputs, Rule, register_rule
from clipping.sums import Sum, add, cross
from clipping.tape import Tape

__all__ = [
    "ClippedSum",
    "Clipper",
    "Dense",
    "FlatClipper",
    "GroupClipper",
    "Inputs",
    "MixesExamples",
    "Outer",
    "Rows",
    "Rule",
    "SampleGrads",
    "Sum",
    "Tape",
    "UnrecordedParameter",
    "add",
    "add_clipped",
    "cross",
    "examine",
    "per_layer",
    "per_parameter",
    "probe",
    "refuse_mixed",
    "register_rule",
    "zero_sum",
]
