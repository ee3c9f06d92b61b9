# SPDX-License-Identifier: Apache-2.0
"""What a training run really leaked: lower bounds on epsilon, beside the upper bound that the run claims."""

from dpopt.audit.bounds.families import GAUSSIAN, Family, any_mechanism, poisson_steps
from dpopt.audit.bounds.gaussian import full_signal, gdp_scores
from dpopt.audit.bounds.independent import clopper_pearson, gdp_threshold, order_statistics
from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.bounds.one_run import fdp_one_run, steinke
from dpopt.audit.bounds.per_step import per_step
from dpopt.audit.canaries.canary import Canaries
from dpopt.audit.canaries.coins import read_evidence
from dpopt.audit.canaries.inputs import mislabelled
from dpopt.audit.evidence import Evidence, joined

__all__ = [
    "GAUSSIAN",
    "Canaries",
    "Evidence",
    "Family",
    "LowerBound",
    "any_mechanism",
    "clopper_pearson",
    "fdp_one_run",
    "full_signal",
    "gdp_scores",
    "gdp_threshold",
    "joined",
    "mislabelled",
    "order_statistics",
    "per_step",
    "poisson_steps",
    "read_evidence",
    "steinke",
]
