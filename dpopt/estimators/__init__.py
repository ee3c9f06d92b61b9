# SPDX-License-Identifier: Apache-2.0
"""Estimators of the gradient: what each example adds to a release, and what a gradient is made of afterwards.

`Plain` is DP-SGD with any clipper. The others carry public state from release to release; `Dice` carries hidden state
and pays for it. By name: `dpopt.estimators.named`.
"""

from dpopt.estimators.adaptive import Quantile, Slack
from dpopt.estimators.centred import Centred
from dpopt.estimators.clip21 import Clip21
from dpopt.estimators.dice import Dice
from dpopt.estimators.difference import Difference
from dpopt.estimators.estimator import Estimator, Factors, Plain
from dpopt.estimators.named import ESTIMATORS, Run, check_estimator, named_estimator
from dpopt.estimators.scheduled import Scheduled
from dpopt.estimators.stage import Stage, Vectors
from dpopt.estimators.thresholds import TwoThreshold

__all__ = [
    "ESTIMATORS",
    "Centred",
    "Clip21",
    "Dice",
    "Difference",
    "Estimator",
    "Factors",
    "Plain",
    "Quantile",
    "Run",
    "Scheduled",
    "Slack",
    "Stage",
    "TwoThreshold",
    "Vectors",
    "check_estimator",
    "named_estimator",
]
