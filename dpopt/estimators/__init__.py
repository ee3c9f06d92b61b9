# SPDX-License-Identifier: Apache-2.0
"""Estimators of the gradient: what each example adds to a release, and what a gradient is made of afterwards.

`Plain` is DP-SGD with any clipper. The others carry public state from release to release; `Dice` carries hidden state
and pays for it. By name: `dpopt.estimators.registry`.
"""

from dpopt.estimators.centred import Centred
from dpopt.estimators.clip21 import Clip21
from dpopt.estimators.dice import Dice
from dpopt.estimators.diff2 import Difference
from dpopt.estimators.estimator import Estimator, Factors
from dpopt.estimators.plain import Plain
from dpopt.estimators.quantile import Quantile
from dpopt.estimators.registry import ESTIMATORS, Run, check_estimator, named_estimator
from dpopt.estimators.schedule import Scheduled
from dpopt.estimators.slack import Slack
from dpopt.estimators.stage import Stage, Vectors
from dpopt.estimators.two_threshold import TwoThreshold

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
