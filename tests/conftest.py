# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# pytest puts this folder on the path, where tests/clipping would hide the package of that name.
sys.path.insert(0, str(Path(__file__).parent.parent))

torch.set_num_threads(1)
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
