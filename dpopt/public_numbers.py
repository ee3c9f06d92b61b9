# SPDX-License-Identifier: Apache-2.0
"""Refuses numbers that nobody can have meant: not real, not finite, not whole."""

from __future__ import annotations

from numbers import Real


def check_real(name: str, value: object) -> None:
    """Refuse what is no number. True is one to Python, 1.0, and hardly ever meant.

    Raises:
        ValueError: it is a bool, a string, a tensor, or something else that is not a real number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(
            f"expected a number for {name}; got {value!r} ({type(value).__name__}); pass it as a float, such as 1.0"
        )
