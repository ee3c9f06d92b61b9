# SPDX-License-Identifier: Apache-2.0
"""Refusals a caller may want to catch."""


class MixesExamples(ValueError):
    """A module or loss lets one example influence another's gradient, so clipping would bound nothing."""


class UnrecordedParameter(RuntimeError):
    """A trainable parameter received a gradient that no recorded layer explains."""
