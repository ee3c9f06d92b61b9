# SPDX-License-Identifier: Apache-2.0
"""The canaries of one open run: their coins, what they add to a step, and what its release says of them.

SENSITIVE until the run has ended: coins and draws. Nothing of them is shown, logged or pickled.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipping.gradients.points import Points
from clipping.step.step_sum import StepSum
from dpopt.audit.canaries import coins as sealing
from dpopt.audit.canaries.canary import LENGTH, Canaries
from dpopt.audit.canaries.coins import Coins
from dpopt.audit.canaries.costs import measured, stated
from dpopt.audit.canaries.drawing import Drawn, law_of, own_coins, parted
from dpopt.audit.canaries.honest import require_honest
from dpopt.audit.canaries.inputs import Extended, losses_of
from dpopt.audit.canaries.placing import Places, placed
from dpopt.audit.canaries.scoring import Scores
from dpopt.audit.evidence import Evidence
from dpopt.estimators.estimator import Estimator
from dpopt.mechanisms import Mechanism
from dpopt.randomness import RandomKey, generator, insecure_key
from dpopt.release.randomness_tiers import Tier
from dpopt.release.release import Seen
from dpopt.sampling import PoissonSampling, Records, Sampling


class Audited:
    """The canaries of a run that draws by `sampling` (the widened one) and sums by `step`."""

    def __init__(
        self,
        canaries: Canaries,
        sampling: Sampling,
        estimator: Estimator,
        mechanism: Mechanism,
        step: StepSum,
    ) -> None:
        require_honest(canaries, estimator, mechanism)
        self.canaries = canaries
        self.evidence: tuple[Evidence, ...] | None = None
        self._sampling, self._mechanism, self._step = sampling, mechanism, step
        self._coins: Coins | None = None
        self._drawn: dict[int, Drawn] = {}
        self._here: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._before: Tensor | None = None
        self._num_joined = 0
        self._normal, self._information = np.zeros(canaries.num), 0.0
        if canaries.is_dirac:  # where there is no room for them is told now
            self._placed(insecure_key(0))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "expected the coins of a run to stay in it; got a copy or a pickle; read its files at the end"
        )

    # -- a run begins and ends --------------------------------------------------------------------------

    def toss(self, tier: Tier) -> dict[str, object]:
        """Toss the coins of a run that begins; what its ledger shall know of them."""
        canaries, key = self.canaries, tier.key
        # On a grid the noise is larger than charged by what pays for rounding.
        held = self._mechanism if hasattr(self._mechanism, "rounding") else tier
        self._enlarged = 1 + getattr(held, "rounding", 0.0)
        self._coins = sealing.tossed(key, canaries.num)
        self.evidence, self._num_joined = None, 0
        self._drawn.clear()
        self._scores = Scores(canaries.num, *law_of(self._sampling))
        self._places = self._placed(key) if canaries.is_dirac else None
        self._before = None if canaries.is_dirac else losses_of(canaries)
        return {"kind": canaries.kind, "canaries": canaries.num, "commitment": self._coins.commitment}

    def begin(self, ledger: Path, charges_before: int) -> None:
        """The run has its ledger: note there that coins are sealed, and say what the canaries will cost."""
        assert self._coins is not None
        self._charges_before = charges_before
        sealing.sealed(ledger, self._coins)
        clipper = self._step.contribution.clipper
        said = stated(self.canaries, self._sampling, self._places, clipper, self._mechanism)
        print(f"dpopt: audit: {said}", file=sys.stderr)

    def close(self, ledger: Path) -> None:
        """The run has ended: score what is left to score, and open the coins. Once; nothing where nothing was released.

        Raises:
            OSError: the files could not be written; `evidence` holds what would be in them.
        """
        coins, self._coins = self._coins, None
        if coins is None or not self._scores.informations:
            return
        self.evidence = self._scored(coins)
        told = measured(
            self.canaries, self._places, self._step.contribution.clipper, self._mechanism,
            steps=len(self._scores.informations), joined=self._num_joined if own_coins(self._sampling) else None,
        )  # fmt: skip
        sealing.opened(ledger, coins, self.evidence, told | {"charges_before": self._charges_before})

    def joined(self, dataset: Records[object]) -> Records[object]:
        """The data set, and behind it the input canaries that may be drawn."""
        records = self.canaries.records
        return dataset if records is None else Extended(dataset, records)

    # -- in each step -----------------------------------------------------------------------------------

    @property
    def num_places(self) -> int:
        """How many places of a draw are canaries'."""
        return self.canaries.num

    def part(self, number: int, indices: Sequence[int], num_records: int) -> list[int]:
        """The records of draw `number` out of N + m places; input canaries that are in follow, as numbers from N on."""
        assert self._coins is not None
        drawn = self._drawn[number] = parted(indices, num_records, self.canaries.num)
        if self.canaries.is_dirac:
            return drawn.records
        included = self._coins.included
        return [*drawn.records, *(num_records + i for i in drawn.canaries if included[i])]

    def start(self, number: int) -> None:
        """The step of draw `number` begins."""
        self._here = np.array(self._drawn.pop(number).canaries, dtype=np.int64)
        for past in [n for n in self._drawn if n < number]:
            del self._drawn[past]

    def join(self) -> Seen:
        """Add the canaries that are drawn and in to the step's sum, through its clipper; what shall see its releases."""
        self._normal[:], self._information = 0.0, 0.0
        assert self._coins is not None
        took_part = self._here[self._coins.included[self._here]]
        self._num_joined += len(took_part)
        if self._places is None or not len(took_part):
            return self.see
        ranks = np.full(self.canaries.num, -1)
        ranks[took_part] = np.arange(len(took_part))
        scale = self._step.sums.scale(len(took_part))
        found = {}
        for row, group in self._places.groups.items():
            length = LENGTH * self._step.contribution.clipper.clip_norms[row] / scale
            found |= self._points(group, torch.from_numpy(ranks), len(took_part), length)
        self._step.join(found, len(took_part))
        return self.see

    def see(self, released: Mapping[str, Tensor], stds: Mapping[str, float], divisor: float) -> None:
        """One release of the step: vectors and the deviation of their noise, both divided by `divisor`."""
        if self._places is None:
            return
        contribution = self._step.contribution
        for prefix, clipper in contribution.clippers.items():
            for row, group in self._places.groups.items():
                for name, there in group.items():
                    adds = clipper.clip_norms[row] / divisor
                    std = self._enlarged * (
                        stds[prefix + name] or adds
                    )  # without noise: as with one clip norm
                    found = released[prefix + name].detach().reshape(-1)[there.places] / std
                    self._normal[there.numbers.cpu().numpy()] += (adds / std) * found.double().cpu().numpy()
                adds = clipper.clip_norms[row] / divisor
                std = self._enlarged * (stds[prefix + next(iter(group))] or adds)
                self._information += (adds / std) ** 2

    def end_step(self) -> None:
        """The step was released."""
        assert self._coins is not None
        if self._places is None:
            self._scores.informations.append(0.0)
            return
        strength = math.sqrt(self._information)
        took_part = self._here[self._coins.included[self._here]]
        self._scores.add(self._normal / strength, strength, took_part, self._here)

    # -----------------------------------------------------------------------------------------------------

    def _placed(self, key: RandomKey) -> Places:
        sums = self._step.sums
        return placed(self.canaries, sums.groups, self._step.parameters, generator(key, "canaries", "places"))

    def _points(
        self, group: Mapping[str, object], ranks: Tensor, num: int, length: float
    ) -> dict[str, Points]:
        found = {}
        for name, there in group.items():
            numbers, places = there  # pyright: ignore[reportGeneralTypeIssues]
            rows = ranks.to(places.device)[numbers]
            mine = rows >= 0
            parameter = self._step.parameters[name]
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            values = torch.full((int(mine.sum()),), length, dtype=wide, device=places.device)
            if len(values):
                found[name] = Points(rows[mine], places[mine], values, num, parameter.shape)
        return found

    def _scored(self, coins: Coins) -> tuple[Evidence, ...]:
        if self._places is not None:
            rate = self._sampling.sampling_rate if isinstance(self._sampling, PoissonSampling) else None
            noisy = getattr(self._mechanism, "noise_multiplier", 0.0) > 0
            # Around a centre every record speaks at every coordinate.
            alone = (
                self.canaries.untouched
                and self._step.contribution.moved is None
                and own_coins(self._sampling)
            )
            return self._scores.evidence(coins.included, alone=alone, noisy=noisy, rate=rate)
        assert self._before is not None
        fallen = (self._before - losses_of(self.canaries)).double().nan_to_num(-math.inf, math.inf, -math.inf)
        scores = fallen.cpu().numpy().round(6)
        kind = f"{self.canaries.kind}, fall of the loss"
        return (Evidence(scores, coins.included, kind),)
