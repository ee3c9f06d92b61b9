# SPDX-License-Identifier: Apache-2.0
"""What a training run really leaked: lower bounds on epsilon, beside the upper bound that the run claims."""

from dpopt.audit.bounds import LowerBound
from dpopt.audit.bounds_gaussian import full_signal, gdp_scores
from dpopt.audit.bounds_independent import clopper_pearson, gdp_threshold, order_statistics
from dpopt.audit.bounds_one_run import fdp_one_run, steinke
from dpopt.audit.bounds_per_step import per_step
from dpopt.audit.canaries import Canaries
from dpopt.audit.coins import read_evidence
from dpopt.audit.evidence import Evidence, joined
from dpopt.audit.families import GAUSSIAN, Family, any_mechanism, poisson_steps
from dpopt.audit.inputs import mislabelled

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
