# SPDX-License-Identifier: Apache-2.0
"""Rules: from a layer, its inputs and its output gradient to per-example gradients of its parameters."""

from clipping.rules.registry import Entry, Inputs, Rule, WholeRule, rule, rule_for  # isort: skip - the others need it
from clipping.rules import (  # each registers its layers
    attention,
    bilinear,
    conv,
    conv_transposed,
    embedding,
    embedding_bag,
    linear,
    mixture_of_experts,
    norm,
    prelu,
    recurrent,
)

__all__ = [
    "Entry",
    "Inputs",
    "Rule",
    "WholeRule",
    "attention",
    "bilinear",
    "conv",
    "conv_transposed",
    "embedding",
    "embedding_bag",
    "linear",
    "mixture_of_experts",
    "norm",
    "prelu",
    "recurrent",
    "rule",
    "rule_for",
]
