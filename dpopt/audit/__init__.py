# SPDX-License-Identifier: Apache-2.0
"""What a training run really leaked: lower bounds on epsilon, beside the upper bound that the run claims."""

from dpopt.audit.evidence import Evidence

__all__ = ["Evidence"]
