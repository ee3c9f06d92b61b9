# SPDX-License-Identifier: Apache-2.0
"""Numbers for people are never below the bound, and the pictures are pictures."""

import math

import pytest

from dpopt.reports.report import number, rounded_up, sure


def test_an_epsilon_is_rounded_up() -> None:
    assert rounded_up(7.98001) == "7.99"
    assert rounded_up(8.0) == "8.00"
    assert rounded_up(0.00001) == "0.01"
    assert rounded_up(math.inf) == "infinity"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.49529, "0.495"), (12.0, "12"), (0, "0"), (1e-5, "1e-05"), (None, "none"), (1234.5, "1234")],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(0.0, "50.0 %"), (1.0, "73.2 %"), (8.0, "99.97 %"), (50.0, "100.00 %"), (math.inf, "100.00 %")],
)
def test_how_sure_an_attacker_can_be(epsilon: float, text: str) -> None:
    assert sure(epsilon) == text
