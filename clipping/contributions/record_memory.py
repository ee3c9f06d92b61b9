# SPDX-License-Identifier: Apache-2.0
"""A memory of each record's gradient, for estimators that clip what is new in it.

SENSITIVE: the memory holds sums of clipped gradient differences of single records. It needs records x parameters
numbers: for adapters and small models.

References: Khirirat et al. (2023), arXiv:2305.18929 (Clip21); Islamov et al. (2025), arXiv:2502.11682.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from clipping.clippers.whole_gradient import FlatClipper
from clipping.contributions.contribution import Contribution
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.shifted import shifted


class Memory:
    """h_i for each of `num_records` records: clipped is u_i = clip(g_i - h_i, clip_norm), then h_i <- h_i + rate u_i.

    `contribution` is what a step adds, `keep` writes the step's changes once it is released, `forget` drops them.

    Guarantees
    ----------
    The memory of a record is a function of its own gradients and of the steps in which it took part; nothing of one
    record enters another's (test_guarantee_a_memory_holds_its_own_record_only).
    """

    def __init__(self, num_records: int, clip_norm: float, rate: float) -> None:
        self.num_records = num_records
        self.clip_norm = clip_norm
        self.rate = rate
        self._rows: dict[str, Tensor] = {}
        self._changes: list[tuple[str, Tensor, Tensor]] = []

    def contribution(self) -> Contribution:
        """What one example of the next step adds; rows must be told apart."""
        self.forget()
        return Contribution(
            FlatClipper(self.clip_norm),
            of_records=self._of_records,
            num_records=self.num_records,
            forget=self.forget,
        )

    def keep(self) -> None:
        """The step is released: remember it."""
        for name, records, change in self._changes:
            rows = self._rows.get(name)
            if rows is None:
                rows = self._rows[name] = change.new_zeros(self.num_records, *change.shape[1:])
            rows.index_add_(0, records, change, alpha=self.rate)
        self._changes.clear()

    def clear(self) -> None:
        """Every record begins anew."""
        self._rows.clear()
        self._changes.clear()

    def forget(self) -> None:
        """The step was not released."""
        self._changes.clear()

    def __repr__(self) -> str:
        return f"Memory({self.num_records}, {self.clip_norm}, {self.rate}, <hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "expected the memory of records to stay in the run that made it; got a copy or a pickle of it, which tells "
            "about single records; save the model's weights"
        )

    def _of_records(self, records: Sequence[int]) -> Contribution:
        if records and not 0 <= min(records) <= max(records) < self.num_records:
            raise ValueError(
                f"expected records from 0 to {self.num_records - 1}; got one outside; make the estimator with the "
                "number of records of the dataset"
            )
        index = torch.tensor(records, dtype=torch.long, device="cpu")

        def moved(name: str, grads: SampleGrads, scale: float) -> SampleGrads:
            rows = self._rows.get(name)
            if rows is None:
                return grads
            return shifted(grads, rows[index.to(rows.device)] / scale)

        def seen(name: str, grads: SampleGrads, weights: Tensor) -> None:
            dense = grads.dense()
            change = dense * weights.to(dense.dtype).view(-1, *[1] * (dense.dim() - 1))
            self._changes.append((name, index.to(dense.device), change.detach().float()))

        return Contribution(FlatClipper(self.clip_norm), moved=moved, seen=seen)
