# SPDX-License-Identifier: Apache-2.0
"""The kinds of pairs that one step may be dominated by, and what is computed of each.

To add one: write its file, as `accountants.dominating_pairs.emptied_record`, and add one line here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from accountants.dominating_pairs.connect_the_dots import dots, reach
from accountants.dominating_pairs.emptied_record import (
    emptied_delta,
    emptied_directions,
    emptied_law,
    emptied_nodes,
    emptied_reach,
)
from accountants.dominating_pairs.feedback_step import (
    shifted_delta,
    shifted_directions,
    shifted_law,
    shifted_mixed,
    shifted_nodes,
    shifted_reach,
)
from accountants.dominating_pairs.gaussian import sampled_delta
from accountants.dominating_pairs.grid_law import Law
from accountants.dominating_pairs.renyi_moments import Part
from accountants.dominating_pairs.replaced_record import (
    swapped_delta,
    swapped_directions,
    swapped_law,
    swapped_nodes,
    swapped_reach,
)
from accountants.dominating_pairs.sampled_step import (
    EMPTIED,
    FIXED,
    GROUP,
    ONE,
    POISSON,
    SHIFTED,
    Step,
    sampled_directions,
    sampled_nodes,
)

Array = NDArray[np.float64]
Ends = tuple[float, float]
Mixed = tuple[Sequence[float], Sequence[float]]


def _apart(distance: float) -> Callable[[Step], Mixed]:
    """Sampled, the two laws are those of Gaussians at this distance, else they are alike."""
    return lambda step: ([1 - step.sampling_rate, step.sampling_rate], [0.0, distance])


class Kind(NamedTuple):
    """One kind of pair (P, Q); `removed` chooses P against Q, or else Q against P.

    `law` discretises a step between two losses, never below the truth; `reach` finds the losses outside of which little
    lies; `nodes` lays some over them, roughly, with the logarithms of their masses; `delta` is the exact curve of one
    step, from above, in the worse direction; `directions` is what moments are summed over; `mixed` are probabilities and
    distances of the Gaussian pairs that it mixes, as an upper bound; `alike` says that both directions are.
    """

    law: Callable[[Step, bool, float, Ends], Law]
    reach: Callable[[Step, bool, float], Ends]
    nodes: Callable[[Step, Ends, bool, int], tuple[Array, Array]]
    delta: Callable[[Step, float], float]
    directions: Callable[[Sequence[Step]], Sequence[Sequence[Part]]]
    mixed: Callable[[Step], Mixed]
    alike: bool = False


_SWAPPED = Kind(
    law=lambda step, removed, mesh, ends: swapped_law(step, mesh, ends),
    reach=lambda step, removed, mass: swapped_reach(step, mass),
    nodes=lambda step, ends, removed, count: swapped_nodes(step, ends, count),
    delta=swapped_delta,
    directions=swapped_directions,
    mixed=_apart(2.0),
    alike=True,
)

_SHIFTED = Kind(
    law=shifted_law,
    reach=shifted_reach,
    nodes=shifted_nodes,
    delta=shifted_delta,
    directions=shifted_directions,
    mixed=shifted_mixed,
)

KINDS: Mapping[str, Kind] = {
    ONE: Kind(
        law=dots,
        reach=lambda step, removed, mass: reach([step], removed, mass)[0],
        nodes=sampled_nodes,
        delta=lambda step, epsilon: sampled_delta(1 / step.noise_multiplier, step.sampling_rate, epsilon),
        directions=sampled_directions,
        mixed=_apart(1.0),
    ),
    POISSON: _SWAPPED,
    FIXED: _SWAPPED,
    EMPTIED: Kind(
        law=emptied_law,
        reach=emptied_reach,
        nodes=emptied_nodes,
        delta=emptied_delta,
        directions=emptied_directions,
        mixed=_apart(1.0),
    ),
    SHIFTED: _SHIFTED,
    GROUP: _SHIFTED,
}


def reaches(steps: Sequence[Step], removed: bool, mass: float) -> list[Ends]:
    """Find for each step the losses (low, high) outside of which the curve and its excess are at most `mass`."""
    ones = iter(reach([step for step in steps if step.pair == ONE], removed, mass))
    return [next(ones) if step.pair == ONE else KINDS[step.pair].reach(step, removed, mass) for step in steps]
