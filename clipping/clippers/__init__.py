# SPDX-License-Identifier: Apache-2.0
"""Clippers: from the norms of per-example gradients to the weights that bound them."""

from clipping.clippers.clipper import Clipper
from clipping.clippers.whole_gradient import AutomaticClipper, FlatClipper, PerSampleAdaptiveClipper

__all__ = [
    "AutomaticClipper",
    "Clipper",
    "FlatClipper",
    "PerSampleAdaptiveClipper",
]
