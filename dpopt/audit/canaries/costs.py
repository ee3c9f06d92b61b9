# SPDX-License-Identifier: Apache-2.0
"""What canaries cost a run: stated before it begins, and measured when it has ended. Public numbers only."""

from __future__ import annotations

import math

from clipping import Clipper
from dpopt.audit.canaries.canary import Canaries
from dpopt.audit.canaries.drawing import law_of
from dpopt.audit.canaries.placing import Places
from dpopt.mechanisms import Mechanism
from dpopt.sampling import Sampling


def stated(
    canaries: Canaries, sampling: Sampling, places: Places | None, clipper: Clipper, mechanism: Mechanism
) -> str:
    """What they will cost, in a few sentences."""
    mean = _share(sampling) * canaries.num / 2
    said = (
        f"{canaries.num} canaries ({canaries.kind}), each in by a secret fair coin, are drawn and paid for as records; no "
        "record takes part more often for them, so they cost no budget."
    )
    if places is None:
        return f"{said} About {mean:.3g} of them join each batch, and are learnt like records"
    length, noise = _length(places, clipper), _noise(places, clipper, mechanism)
    whole = length >= clipper.sensitivity * (1 - 1e-9)
    weaker = (
        ""
        if whole
        else f"; each is {length / clipper.sensitivity:.0%} of the clip norm long, as its group is clipped by itself, and shows "
        "that much less"
    )
    return (
        f"{said} They lie at {places.num_touched:,} of {places.num_coordinates:,} trained coordinates "
        f"({places.num_touched / places.num_coordinates:.2%}); about {mean:.3g} of them join each step, which moves its sum by "
        f"{length * math.sqrt(mean):.3g}, beside noise of norm {noise:.3g}{weaker}"
    )


def measured(
    canaries: Canaries,
    places: Places | None,
    clipper: Clipper,
    mechanism: Mechanism,
    *,
    steps: int,
    joined: int | None,
) -> dict[str, object]:
    """What they did cost in `steps` steps, which `joined` of them joined in all.

    None: not told, as where batches have a fixed size it would tell how many records were drawn.
    """
    told: dict[str, object] = {"steps": steps, "canaries": canaries.num, "joined": joined}
    if places is not None:
        moved = None if joined is None else _length(places, clipper) * math.sqrt(joined / steps)
        told["moved_each_step"] = moved
        told["norm_of_noise"] = _noise(places, clipper, mechanism)
        told["share_of_coordinates"] = places.num_touched / places.num_coordinates
    return told


def _share(sampling: Sampling) -> float:
    """The part of the steps that a record takes part in, on average."""
    kind, amount = law_of(sampling)
    if kind == "known":
        return 1 / sampling.steps_per_charge
    return amount if kind == "each step" else 1 / amount


def _length(places: Places, clipper: Clipper) -> float:
    return math.hypot(*(clipper.clip_norms[row] for row in places.groups))


def _noise(places: Places, clipper: Clipper, mechanism: Mechanism) -> float:
    multiplier = getattr(mechanism, "noise_multiplier", 0.0)
    return multiplier * clipper.sensitivity * math.sqrt(places.num_coordinates)
