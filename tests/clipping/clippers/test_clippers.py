# SPDX-License-Identifier: Apache-2.0
"""The law of `clipping.clippers.whole_gradient`: weighted, one example's gradient is never longer than the sensitivity."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipping import (
    CLIPPERS as NAMED,
)
from clipping import (
    AutomaticClipper,
    ClippedSum,
    FlatClipper,
    Group,
    GroupClipper,
    PerSampleAdaptiveClipper,
    by_component,
    check_clipping,
    named_clipper,
    per_layer,
    per_parameter,
    sum_groups,
    zero_sum,
)
from clipping.clippers.residual import RestClipper
from clipping.clippers.robust import HuberClipper, NormalisedClipper


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))


NAMES = [name for name, _ in model().named_parameters()]
HALVES = (tuple(NAMES[:2]), tuple(NAMES[2:]))
PATTERNS = {"*.weight": 0.1, "*.bias": 2.0}

# A new clipper is one line here; those that leave short gradients as they are stand in the first table.
CLIPPING = {
    "flat": FlatClipper(1.5),
    "flat, tiny": FlatClipper(1e-6),
    "flat, huge": FlatClipper(1e6),
    "groups": GroupClipper(HALVES, (FlatClipper(0.3), FlatClipper(2.0))),
    "per layer": per_layer(model(), 0.7),
    "per parameter": per_parameter(model(), [0.1, 1, 2, 3, 4, 5]),
    "by component": by_component(model(), PATTERNS),
}
CLIPPERS = CLIPPING | {
    "automatic": AutomaticClipper(1.5),
    "automatic, nearly normalised": AutomaticClipper(1e6, gamma=1e-300),
    "automatic, slow": AutomaticClipper(0.1, gamma=1e30),
    "psac": PerSampleAdaptiveClipper(1.5),
    "psac, nearly normalised": PerSampleAdaptiveClipper(1e6, r=1e-300),
    "psac, slow": PerSampleAdaptiveClipper(0.1, r=1e30),
    "huber": HuberClipper(1.5, mu=0.5),
    "huber, nearly the mean": HuberClipper(1e-6, mu=1e30),
    "huber, flat": HuberClipper(1.5, mu=0.0),
    "normalised": NormalisedClipper(),
    "normalised, to the shortest": NormalisedClipper(1e6, nu=1e-300),
    "normalised, slow": NormalisedClipper(0.1, nu=1e30),
    "rest": RestClipper(2.0, first=0.3),
    "rest, tiny first": RestClipper(1e6, first=1e-300),
    "rest, tiny": RestClipper(1e-6, first=0.25),
    "per layer, rest": per_layer(model(), 0.7, rule=partial(RestClipper, first=0.1)),
    "per layer, huber": per_layer(model(), 0.7, rule=partial(HuberClipper, mu=0.1)),
    "mixed groups": GroupClipper(HALVES, (AutomaticClipper(0.3), PerSampleAdaptiveClipper(2.0, r=0.01))),
    "per layer, automatic": per_layer(model(), 0.7, rule=partial(AutomaticClipper, gamma=0.1)),
    "by component, psac": by_component(model(), PATTERNS, rule=PerSampleAdaptiveClipper),
}
DTYPES = (torch.float32, torch.float64)

norm_values = st.one_of(
    st.floats(0, 1e4, width=32),
    st.floats(2.0**-126, 2.0**127, width=32),
    st.sampled_from([0.0, 1e-45, 1e-30, 1e-10, 1e19, 3e38, math.inf, math.nan]),
)


@pytest.mark.parametrize("name", CLIPPERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestConformance:
    """What any `Clipper` must satisfy."""

    @settings(max_examples=60, deadline=None)
    @given(values=st.lists(norm_values, min_size=1, max_size=4))
    def test_weighted_norm_is_at_most_the_clip_norm_of_the_group(self, name, dtype, values):
        clipper, norms = CLIPPERS[name], torch.tensor(values, dtype=dtype)
        for group, bound in enumerate(clipper.clip_norms):
            weights = clipper.weights(norms, group)
            assert weights.shape == norms.shape and weights.dtype == dtype
            assert torch.isfinite(weights).all() and (weights >= 0).all()
            for weight, norm in zip(weights.tolist(), norms.tolist(), strict=True):
                # Fractions: what was rounded is the weight, and nothing after it.
                assert weight == 0 or Fraction(weight) * Fraction(norm) <= Fraction(bound)

    def test_the_clip_norms_make_up_the_sensitivity(self, name, dtype):
        clipper = CLIPPERS[name]
        assert len(clipper.clip_norms) == len(clipper.groups(NAMES))
        assert math.hypot(*clipper.clip_norms) <= clipper.sensitivity * (1 + 1e-12)

    def test_non_finite_norms_weigh_nothing_in_their_group(self, name, dtype):
        clipper = CLIPPERS[name]
        for group in range(len(clipper.clip_norms)):
            weights = clipper.weights(torch.tensor([math.nan, 0.5, math.inf, -math.inf], dtype=dtype), group)
            assert (weights == 0).tolist() == [True, False, True, True]

    def test_a_longer_gradient_never_contributes_less(self, name, dtype):
        clipper, norms = CLIPPERS[name], torch.logspace(-9, 9, 200, dtype=dtype)
        for group in range(len(clipper.clip_norms)):
            moved = (norms * clipper.weights(norms, group)).double()
            assert (moved[1:] >= moved[:-1] * (1 - 1e-6)).all() and moved[-1] > 0

    def test_groups_partition_the_parameters(self, name, dtype):
        groups = CLIPPERS[name].groups(NAMES)
        assert sorted(n for group in groups for n in group) == sorted(NAMES)

    def test_no_example_is_no_weight(self, name, dtype):
        assert CLIPPERS[name].weights(torch.zeros(0, dtype=dtype), 0).shape == (0,)


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_passes_short_gradients_unchanged_and_its_weights_fall_with_the_norm(name, dtype):
    clipper, norms = CLIPPING[name], torch.logspace(-9, 9, 200, dtype=dtype)
    for group, bound in enumerate(clipper.clip_norms):
        weights = clipper.weights(norms, group)
        assert (weights[norms < bound * (1 - 1e-6)] == 1).all() and weights[0] == 1
        assert (weights[1:] <= weights[:-1]).all()
        long = norms > bound
        torch.testing.assert_close(
            (weights * norms)[long], torch.full_like(norms, bound)[long], rtol=1e-6, atol=0
        )


def test_automatic_weights_are_those_of_the_paper_and_normalise_as_gamma_falls():
    norms = torch.tensor([0.0, 1e-3, 0.01, 1.0, 50.0], dtype=torch.float64)
    expected = torch.tensor([200.0, 2 / 0.011, 100.0, 2 / 1.01, 2 / 50.01], dtype=torch.float64)
    torch.testing.assert_close(AutomaticClipper(2.0).weights(norms), expected)
    normalised = AutomaticClipper(2.0, gamma=1e-9).weights(norms[1:]) * norms[1:]
    torch.testing.assert_close(normalised, torch.full((4,), 2.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_psac_weights_are_those_of_the_paper():
    norms = torch.tensor([0.0, 0.1, 0.9, 50.0], dtype=torch.float64)
    expected = torch.tensor([2.0, 2 / 0.6, 2.0, 2 / (50 + 0.1 / 50.1)], dtype=torch.float64)
    torch.testing.assert_close(PerSampleAdaptiveClipper(2.0, r=0.1).weights(norms), expected)
    # Not monotone: the weight is largest where (|g| + r)^2 = r.
    around = torch.tensor([0.1**0.5 - 0.1]) * torch.tensor([0.9, 1.0, 1.1])
    low, top, high = PerSampleAdaptiveClipper(1.0, r=0.1).weights(around).tolist()
    assert top > low and top > high
    # Where AUTO-S gives a vanishing gradient the weight C / gamma, this gives it C.
    assert PerSampleAdaptiveClipper(1.0, r=0.01).weights(torch.zeros(1)).item() == pytest.approx(1.0)
    assert AutomaticClipper(1.0).weights(torch.zeros(1)).item() == pytest.approx(100.0)


def test_sensitivities():
    assert FlatClipper(2.0).sensitivity == AutomaticClipper(2.0).sensitivity == 2.0
    assert PerSampleAdaptiveClipper(2.0).sensitivity == 2.0
    assert CLIPPERS["groups"].sensitivity == pytest.approx(math.hypot(0.3, 2.0))
    assert CLIPPERS["mixed groups"].sensitivity == pytest.approx(math.hypot(0.3, 2.0))
    assert per_layer(model(), 0.7).sensitivity == pytest.approx(0.7)
    assert per_parameter(model(), [1] * 6).sensitivity == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan])
def test_clip_norms_that_bound_nothing_are_refused(clip_norm):
    expected = r"expected a finite clip_norm > 0; got .*; choose the norm beyond which one example's gradient"
    for rule in (FlatClipper, AutomaticClipper, PerSampleAdaptiveClipper):
        with pytest.raises(ValueError, match=expected):
            rule(clip_norm)
        with pytest.raises(ValueError, match=expected):
            per_layer(model(), clip_norm, rule=rule)
    with pytest.raises(ValueError, match=expected):
        per_parameter(model(), [1.0] * 5 + [clip_norm])
    with pytest.raises(ValueError, match=expected):
        by_component(model(), {"*": clip_norm})
    with pytest.raises(ValueError, match=r"expected a finite gamma > 0; got .*; 0.01 is usual"):
        AutomaticClipper(1.0, gamma=clip_norm)
    with pytest.raises(ValueError, match=r"expected a finite r > 0; got .*; 0.1 is usual"):
        PerSampleAdaptiveClipper(1.0, r=clip_norm)


def test_wrong_groups_are_refused():
    flat = FlatClipper(1.0)
    with pytest.raises(
        ValueError, match=r"one clip norm per group, 2 of them; got 1; give the list in the order"
    ):
        GroupClipper((("a",), ("b",)), (flat,))
    with pytest.raises(ValueError, match=r"one clip norm per group, 6 of them; got 2"):
        per_parameter(model(), [1.0, 2.0])
    clipper = GroupClipper((("a", "b"), ("b",)), (flat, flat))
    with pytest.raises(
        ValueError, match=r"of a single group for each group; got a GroupClipper of 2; list its"
    ):
        GroupClipper((("a", "b"),), (clipper,))
    with pytest.raises(
        ValueError, match=r"each trainable parameter once; got a difference at \['b'\]; build the"
    ):
        clipper.groups(["a", "b"])
    with pytest.raises(ValueError, match=r"got a difference at \['c'\]"):
        clipper.groups(["a", "b", "b", "c"])
    with pytest.raises(ValueError, match=r"got a difference at \['b'\]"):
        clipper.groups(["a"])


@pytest.mark.parametrize("name", sorted(set(NAMED) - {n for n in NAMED if n.startswith("per_adapter")}))
def test_a_named_clipper_has_the_clip_norm_as_its_sensitivity(name):
    stack = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    clipper = named_clipper(name, stack, 0.3)
    assert clipper.sensitivity == pytest.approx(0.3, rel=1e-12)
    assert len(clipper.clip_norms) == (2 if name.startswith("per_") else 1)


def test_an_unknown_name_is_refused_with_the_names():
    with pytest.raises(
        ValueError, match=r"one of flat, automatic, psac, per_layer, .*; got 'adaptive'; flat is"
    ):
        check_clipping("adaptive")
    with pytest.raises(ValueError, match="got 'flat:psac'"):
        named_clipper("flat:psac", model(), 1.0)


def test_a_clipped_sum_knows_its_groups():
    clipper = CLIPPERS["groups"]
    groups = sum_groups(clipper, clipper.groups(NAMES))
    assert groups == (Group(HALVES[0], 0.3), Group(HALVES[1], 2.0))
    total = {name: torch.ones(2) for name in NAMES}
    clipped = ClippedSum(total, clipper.sensitivity, groups)
    assert (clipped + clipped).groups == groups
    with pytest.raises(ValueError, match="two clipped sums of the same parameters and sensitivity"):
        clipped + ClippedSum(total, clipper.sensitivity)
    for wrong in (groups[:1], (*groups, groups[0])):
        with pytest.raises(
            ValueError, match=r"each parameter of the sum once; got a difference at .*; build them"
        ):
            ClippedSum(total, clipper.sensitivity, wrong)


def test_clipped_sums_add_and_keep_the_sensitivity():
    first = ClippedSum({"w": torch.ones(2)}, 1.0)
    second = first + ClippedSum({"w": torch.full((2,), 2.0)}, 1.0)
    assert second.sensitivity == 1.0
    torch.testing.assert_close(second.total["w"], torch.full((2,), 3.0))
    for other in (ClippedSum({"w": torch.ones(2)}, 2.0), ClippedSum({"v": torch.ones(2)}, 1.0)):
        with pytest.raises(
            ValueError, match=r"same parameters and sensitivity; got 1 parameters at 1.0 and 1"
        ):
            first + other


def test_empty_sum_is_zero_in_the_accumulation_dtype():
    parameters = {
        "a": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "b": nn.Parameter(torch.ones(3, dtype=torch.float64)),
    }
    empty = zero_sum(parameters, 2.0)
    assert empty.sensitivity == 2.0
    assert {n: v.dtype for n, v in empty.total.items()} == {"a": torch.float32, "b": torch.float64}
    assert all((v == 0).all() and not v.requires_grad for v in empty.total.values())
