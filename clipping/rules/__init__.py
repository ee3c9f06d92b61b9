# SPDX-License-Identifier: Apache-2.0
"""Rules: from a layer, its inputs and its output gradient to per-example gradients of its parameters."""

from clipping.rules.registry import Inputs, Rule, register_rule, rule_for  # isort: skip - the others need it
from clipping.rules import conv, embedding, linear, norm  # each registers its layers

__all__ = ["Inputs", "Rule", "conv", "embedding", "linear", "norm", "register_rule", "rule_for"]
