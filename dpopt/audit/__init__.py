# SPDX-License-Identifier: Apache-2.0
"""What a training run really leaked: lower bounds on epsilon, beside the upper bound that the run claims."""

from dpopt.audit.canaries import Canaries
from dpopt.audit.coins import read_evidence
from dpopt.audit.evidence import Evidence
from dpopt.audit.inputs import mislabelled

__all__ = ["Canaries", "Evidence", "mislabelled", "read_evidence"]
