# SPDX-License-Identifier: Apache-2.0
"""clipping="adaptive" with Opacus' keywords: the same split of the noise, and a clip norm that goes the same way."""

import math

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.optimizers import AdaClipDPOptimizer
from torch.utils.data import DataLoader

import dpopt
from accountants import Gaussian, PoissonSampled, accountant
from dpopt import PrivacyEngine, Quantile
from tests.support.dpopt.private_runs import examples, familiar, mlp, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
]
KEYWORDS = {
    "target_unclipped_quantile": 0.6, "clipbound_learning_rate": 0.2, "max_clipbound": 20.0, "min_clipbound": 0.05,
    "unclipped_num_std": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("noise", [0.5, 1.0, 5.0])
def test_the_noise_of_gradient_and_count_is_that_of_opacus(noise):
    engine, *_ = familiar(clipping="adaptive", noise=noise, max_grad_norm=0.7, **KEYWORDS)
    estimator = engine.training.estimator
    assert isinstance(estimator, Quantile)
    assert (estimator.target, estimator.rate, estimator.most, estimator.least) == (0.6, 0.2, 20.0, 0.05)
    from dpopt.estimators.step_mechanism import mechanism_of

    mechanism = mechanism_of(estimator, engine.training.mechanism, 0)
    gradient, count = mechanism.stds([0.7, 0.5], [10, 1])
    assert count == pytest.approx(KEYWORDS["unclipped_num_std"])
    effective = (
        noise**-2 - (2 * 3.0) ** -2
    ) ** -0.5  # Andrew et al. 2021, theorem 1, and AdaClipDPOptimizer.add_noise
    assert gradient == pytest.approx(effective * 0.7)
    assert engine.training.event == PoissonSampled(1.0, Gaussian(noise))


def test_the_clip_norm_goes_where_that_of_opacus_goes():
    """Without noise, at a rate of one: the fraction is exact, and both move alike."""
    found = []
    for library in (dpopt, opacus):
        model, engine = mlp(), library.PrivacyEngine(accountant="rdp")
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), clipping="adaptive",
            data_loader=DataLoader(examples(12), batch_size=12), noise_multiplier=0.0, max_grad_norm=0.5,
            **{**KEYWORDS, "unclipped_num_std": 1e-9},
        )  # fmt: skip
        norms = []
        for _ in range(12):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                norms.append(float(optimizer.max_grad_norm))
        found.append(norms)
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][-1] > 0.6
    assert AdaClipDPOptimizer.__name__ == type(optimizer).__name__


def test_the_clip_norm_stays_between_its_bounds():
    for start, bounds in ((1.0, (1.0, 1.01)), (1e-6, (1e-7, 2e-6))):
        options = {"min_clipbound": bounds[0] * 0.999, "max_clipbound": bounds[1]}
        _, model, optimizer, loader = familiar(
            dataset=examples(40), clipping="adaptive", noise=1.0, max_grad_norm=start, clipbound_learning_rate=3.0,
            **options,
        )  # fmt: skip
        for _ in range(3):
            train(model, optimizer, loader)
            assert options["min_clipbound"] <= optimizer.max_grad_norm <= options["max_clipbound"]


def test_a_target_is_met_with_the_noise_of_plain_clipping():
    noises = []
    for options in ({"clipping": "adaptive", **KEYWORDS}, {}):
        model, engine = mlp(), PrivacyEngine(accountant="rdp")
        engine.make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0, epochs=2,
            data_loader=DataLoader(examples(100), batch_size=10), target_epsilon=3.0, target_delta=1e-5, **options,
        )  # fmt: skip
        noises.append(engine.noise_multiplier)
        assert engine.training.steps_left >= 20
    assert noises[0] == pytest.approx(noises[1], rel=0.01)
    event = PoissonSampled(0.1, Gaussian(noises[0]))
    assert (accountant("rdp").curve(event) * 20).epsilon(1e-5) <= 3.0


def test_all_keywords_have_defaults_and_none_goes_elsewhere():
    engine, model, optimizer, loader = familiar(dataset=examples(16), clipping="adaptive", noise=1.0)
    assert engine.training.estimator == Quantile(1.0)
    train(model, optimizer, loader)
    with pytest.raises(ValueError, match=r"expected \['min_clipbound'\] with clipping=\"adaptive\" only"):
        familiar(min_clipbound=0.1)
    with pytest.raises(ValueError, match="expected noise_multiplier < 2"):
        familiar(clipping="adaptive", noise=6.0, unclipped_num_std=3.0)
    with pytest.raises(ValueError, match="expected 0 < least < most"):
        familiar(clipping="adaptive", noise=1.0, min_clipbound=2.0, max_clipbound=1.0)
    with pytest.raises(ValueError, match="expected unclipped_num_std > 0"):
        familiar(clipping="adaptive", noise=1.0, unclipped_num_std=0.0)
    with pytest.raises(ValueError, match="expected a number for max_clipbound; got True"):
        familiar(clipping="adaptive", noise=1.0, max_clipbound=True)
    with pytest.raises(ValueError, match="expected one max_grad_norm with clipping='adaptive'"):
        familiar(clipping="adaptive", noise=1.0, max_grad_norm=[1.0] * 4)
    assert (
        familiar(clipping="adaptive", noise=1.0, unclipped_num_std=math.inf)[0].training.estimator.share
        == 0.01
    )
