# SPDX-License-Identifier: Apache-2.0
"""Canaries: made-up records in a run, each of which takes part by a secret fair coin, so that the run can be audited.

    draw:     sampler over N + m records -> those of the data set | canaries drawn        (SECRET, as every draw)
              "dirac": canaries drawn and in -> one long gradient at a coordinate of their own -> the run's clipper
              -> added to the clipped sum, BEFORE the noise; others: in the batch, as every record
    release:  noisy vectors (what everybody sees) -> the canaries' coordinates, over the known noise -> scores
    the end:  scores and coins are written beside the ledger; until then the coins are in this process only

The law of this file: scores are made of what was released and of public numbers alone, so they tell of no record what
the ledger does not charge; coins tell of made-up records only.

References: Steinke, Nasr, Jagielski (2023), arXiv:2305.08846 (one run, fair coins); Nasr et al. (2023), arXiv:2302.07956
(Dirac gradients in a run); Panda et al. (2025), arXiv:2503.06808 (canaries of new tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dpopt.audit.canaries.drawing import widened
from dpopt.sampling import Sampling

DIRAC = "dirac"
LENGTH = 100.0
"""Clip norms that a canary's gradient is long: every clipper cuts it to its clip norm, or to within 1 % of that."""


@dataclass(frozen=True, slots=True, eq=False)
class Canaries:
    """What a run is audited with: `PrivateTraining(..., audit=Canaries(1000))`, `make_private(..., audit=...)`.

    Each of `num` canaries is a record of the data set if its own secret fair coin says so. Samplers draw from all of
    them, and what is drawn of a canary that is out adds nothing. They pay like every record, and change the price of
    no other; a `Dirac` canary disturbs the others not at all, and the model at its own coordinate only.

    Args:
        num: how many, m. 1,000 show an epsilon up to about 4; see the documentation of the audit.
        kind: "dirac" (white box: a gradient at one coordinate), or, with `records`, what these are.
        where: for "dirac", places in the flattened parameters, by parameter name, e.g. of features or tokens that no
            record has. None: spread over all trainable parameters, where records speak too and less can be said. A layer
            of their own, which never runs, is free of records: model.add_module("canaries", nn.Linear(m, 1, bias=False))
            before the run, where={"canaries.weight": range(m)} and untouched=True.
        untouched: your word that no record of the data set ever has a gradient at these places. Audits that know the
            noise exactly need it; nobody can check it without looking at the data.
        records: for input canaries, `num` items as the data set holds them: made up or public, never copies of private
            records, which would then be in the data twice.
        losses: for input canaries, a function from a list of such items to their losses, shape (B,); its score is how
            much a canary's loss fell in the run. Called without gradients before the first step and after the last.

    Raises:
        ValueError: numbers or kinds that cannot be.

    Example:
        >>> Canaries(1000).kind
        'dirac'

    Guarantees
    ----------
    Coins are fair and independent: bits of SHAKE-256 under the run's secret key, from the operating system
    (test_guarantee_coins_are_fair_independent_and_secret). A hash of them is on the ledger before the first step, so
    no coin is chosen afterwards (test_guarantee_a_changed_coin_is_noticed).
    A canary is drawn by the run's own sampler as every record is, clipped by its own clipper and added before its own
    noise (test_guarantee_a_canary_is_a_record_of_the_run); the charged events are the price of each of
    the N + m records, so lower bounds made of scores and coins lie below the claim with the stated confidence.
    """

    num: int = 1000
    kind: str = DIRAC
    where: Mapping[str, Sequence[int]] | None = None
    untouched: bool = False
    records: Sequence[object] | None = None
    losses: Callable[[list[object]], Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num, bool) or not isinstance(self.num, int) or self.num < 2:
            raise ValueError(f"expected at least 2 canaries; got {self.num!r}; 1000 is usual")
        if self.kind == DIRAC:
            self._check_dirac()
        elif self.records is None or self.losses is None or len(self.records) != self.num:
            had = "none" if self.records is None else f"{len(self.records)}"
            raise ValueError(
                f"expected {self.num} records and a function of their losses for canaries of the kind {self.kind!r}; got "
                f"{had}; pass records= and losses=, or leave kind out for canaries that need neither"
            )
        elif self.where is not None or self.untouched:
            raise ValueError(
                f"expected no places for canaries of the kind {self.kind!r}, which go through the model; got where or "
                "untouched; leave them out"
            )

    def _check_dirac(self) -> None:
        if self.records is not None or self.losses is not None:
            raise ValueError(
                'expected no records for canaries of the kind "dirac", which are gradients; got records or losses; name '
                'the kind of these records, e.g. kind="mislabelled"'
            )
        if self.where is not None:
            places = sum(len(set(there)) for there in self.where.values())
            if places < self.num:
                raise ValueError(
                    f"expected a place for each of {self.num} canaries; got {places} different ones; name more, or take "
                    f"num={places}"
                )

    @property
    def is_dirac(self) -> bool:
        """Whether they are gradients, not inputs."""
        return self.kind == DIRAC

    def widened(self, sampling: Sampling) -> Sampling:
        """The sampler of the data set and all canaries: what an audited run draws by, and is charged for.

        A record takes part no more often than by `sampling`; where batches are of a fixed size, they grow in proportion.
        """
        return widened(sampling, self.num)
