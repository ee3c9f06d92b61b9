# SPDX-License-Identifier: Apache-2.0
"""What does one example contribute? Per-example gradients, kept structured, clipped and summed."""

from clipping.clipped import ClippedSum, Group, sum_groups, zero_sum
from clipping.clippers import AutomaticClipper, Clipper, FlatClipper, PerSampleAdaptiveClipper
from clipping.contributions import Contribution, Count, Measured
from clipping.convolved import Convolved
from clipping.costs import Choice, Costs, measured
from clipping.engines import Begin, Clipping, Collector, Gathering, Idle, Sums, explained
from clipping.errors import MixesExamples, UnrecordedParameter
from clipping.examine import Apart, Together, examine, fits, probe, refuse_mixed
from clipping.grads import Dense, SampleGrads
from clipping.groups import (
    ClipRule,
    GroupClipper,
    by_component,
    per_adapter,
    per_block,
    per_layer,
    per_parameter,
)
from clipping.merging import Held, Merging
from clipping.named import CLIPPERS, check_clipping, named_clipper
from clipping.outer import Outer
from clipping.routed import Routed
from clipping.rows import Rows
from clipping.rules import Inputs, Rule, rule
from clipping.sums import Sum, add, cross
from clipping.tape import Tape
from clipping.two_pass import Measuring, Summing

__all__ = [
    "CLIPPERS",
    "Apart",
    "AutomaticClipper",
    "Begin",
    "Choice",
    "ClipRule",
    "ClippedSum",
    "Clipper",
    "Clipping",
    "Collector",
    "Contribution",
    "Convolved",
    "Costs",
    "Count",
    "Dense",
    "FlatClipper",
    "Gathering",
    "Group",
    "GroupClipper",
    "Held",
    "Idle",
    "Inputs",
    "Measured",
    "Measuring",
    "Merging",
    "MixesExamples",
    "Outer",
    "PerSampleAdaptiveClipper",
    "Routed",
    "Rows",
    "Rule",
    "SampleGrads",
    "Sum",
    "Summing",
    "Sums",
    "Tape",
    "Together",
    "UnrecordedParameter",
    "add",
    "by_component",
    "check_clipping",
    "cross",
    "examine",
    "explained",
    "fits",
    "measured",
    "named_clipper",
    "per_adapter",
    "per_block",
    "per_layer",
    "per_parameter",
    "probe",
    "refuse_mixed",
    "rule",
    "sum_groups",
    "zero_sum",
]
