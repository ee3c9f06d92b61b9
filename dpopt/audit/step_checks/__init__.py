# SPDX-License-Identifier: Apache-2.0
"""Check any training step for privacy faults: ours, another library's, or your own.

`check_step(step)` runs every check on a `TrainingStep` and returns a `StepReport`. See docs/check-your-step.md.
"""

from dpopt.audit.step_checks.case import Make, Run, TrainingStep, released
from dpopt.audit.step_checks.checking import check_step
from dpopt.audit.step_checks.findings import CAUTION, FAULT, HOLDS, UNCHECKED, Finding, StepReport
from dpopt.audit.step_checks.noise import sample_noise
from dpopt.audit.step_checks.records import Entry, Trial
from dpopt.audit.step_checks.sampler import inclusions
from dpopt.audit.step_checks.sensitivity import movement

__all__ = [
    "CAUTION",
    "FAULT",
    "HOLDS",
    "UNCHECKED",
    "Entry",
    "Finding",
    "Make",
    "Run",
    "StepReport",
    "TrainingStep",
    "Trial",
    "check_step",
    "inclusions",
    "movement",
    "released",
    "sample_noise",
]
