# SPDX-License-Identifier: Apache-2.0
"""What does one example contribute? Per-example gradients, kept structured, clipped and summed."""

from clipping.clippers.clipper import Clipper
from clipping.clippers.groups import (
    ClipRule,
    GroupClipper,
    by_component,
    per_adapter,
    per_block,
    per_layer,
    per_parameter,
)
from clipping.clippers.registry import CLIPPERS, check_clipping, named_clipper
from clipping.clippers.whole_gradient import AutomaticClipper, FlatClipper, PerSampleAdaptiveClipper
from clipping.collectors.collector import Begin, Collector, Gathering, Idle
from clipping.collectors.one_pass import Clipping, Sums, explained
from clipping.collectors.same_examples import Held, Merging
from clipping.collectors.two_pass import Measuring, Summing
from clipping.contributions.clipped_sum import ClippedSum, Group, sum_groups, zero_sum
from clipping.contributions.contribution import Contribution, Count, Measured
from clipping.errors import MixesExamples, UnrecordedParameter
from clipping.gradients.convolved import Convolved
from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer
from clipping.gradients.path_costs import Choice, Costs, measured
from clipping.gradients.routed import Routed
from clipping.gradients.rows import Rows
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.sum import Sum, add, cross
from clipping.recording.tape import Tape
from clipping.rules import Inputs, Rule, rule
from clipping.validators.examine import Apart, examine, fits, probe, refuse_mixed

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
