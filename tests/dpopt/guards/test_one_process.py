# SPDX-License-Identifier: Apache-2.0
"""Several processes that would each draw and noise on their own are refused."""

import pytest
import torch
from torch import nn

from dpopt import FlatClipper, GaussianMechanism, PoissonSampling, PrivateTraining


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_group_of_several_ranks_is_refused(ranks, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)

    def run():
        return PrivateTraining(
            nn.Linear(2, 2),
            clipper=FlatClipper(1.0),
            mechanism=GaussianMechanism(1.0),
            sampling=PoissonSampling(0.5, 4.0),
        )

    if ranks == 1:
        run()
        return
    with pytest.raises(RuntimeError, match="an initialised process group of 2"):
        run()
