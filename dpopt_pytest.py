# SPDX-License-Identifier: Apache-2.0
"""A pytest plug-in of one fixture, `check_private_step`; it imports nothing until a test asks for it.

    def test_my_step_is_private(check_private_step):
        check_private_step(my_step)           # a dpopt.audit.step_checks.TrainingStep; fails on a fault

The fixture returns the report, for tests that want to look closer. It stands outside the package dpopt, whose import
loads torch: pytest imports every plug-in when it starts.
"""

import pytest


@pytest.fixture
def check_private_step():
    """A function (step, *, allow=(), seed=0, ...) that fails the test where the training step has a privacy fault.

    Its arguments are those of `dpopt.audit.step_checks.check_step`, and `allow`: names of checks whose faults the test
    knows of. A report in which nothing could be said fails too.
    """
    from dpopt.audit.step_checks import check_step

    def check(step, *, allow=(), seed=0, **options):
        report = check_step(step, seed=seed, **options)
        faults = [fault for fault in report.faults if fault.check not in allow]
        if faults:
            pytest.fail(str(report), pytrace=False)
        if report.exit_code == 3:
            pytest.fail(
                "expected a step whose release and noise can be seen; got none; see .findings", pytrace=False
            )
        return report

    return check
