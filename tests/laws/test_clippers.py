# SPDX-License-Identifier: Apache-2.0
"""The law of `clipping.clippers`: weighted, one example's gradient is never longer than the sensitivity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipping import ClippedSum, FlatClipper, GroupClipper, per_layer, per_parameter, zero_sum


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))


NAMES = [name for name, _ in model().named_parameters()]

# A new clipper is one line here.
CLIPPERS = {
    "flat": FlatClipper(1.5),
    "flat, tiny": FlatClipper(1e-6),
    "flat, huge": FlatClipper(1e6),
    "groups": GroupClipper((tuple(NAMES[:2]), tuple(NAMES[2:])), (0.3, 2.0)),
    "per layer": per_layer(model(), 0.7),
    "per parameter": per_parameter(model(), [0.1, 1, 2, 3, 4, 5]),
}

norm_values = st.one_of(
    st.floats(0, 1e4, width=32),
    st.sampled_from([0.0, 1e-30, 1e19, 3e38, math.inf, math.nan]),
)


@pytest.mark.parametrize("name", CLIPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestConformance:
    """What any `Clipper` must satisfy."""

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_weighted_norm_is_at_most_the_sensitivity(self, name, dtype, data):
        clipper = CLIPPERS[name]
        num_groups = len(clipper.groups(NAMES))
        drawn = data.draw(st.lists(st.lists(norm_values, min_size=3, max_size=3), min_size=1, max_size=1))
        norms = torch.tensor(drawn * num_groups, dtype=dtype)
        norms = norms * torch.tensor(
            data.draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=num_groups, max_size=num_groups))
        ).to(dtype).unsqueeze(1)
        weights = clipper.weights(norms)
        assert weights.shape == norms.shape and weights.dtype == dtype
        assert torch.isfinite(weights).all() and (weights >= 0).all() and (weights <= 1).all()
        moved = torch.where(weights == 0, 0, norms * weights).double().square().sum(0).sqrt()
        assert (moved <= clipper.sensitivity * (1 + 1e-6)).all()

    def test_non_finite_norms_weigh_nothing(self, name, dtype):
        clipper = CLIPPERS[name]
        for bad in (math.nan, math.inf):
            norms = torch.full((len(clipper.groups(NAMES)), 2), 0.5, dtype=dtype)
            norms[0, 1] = bad
            weights = clipper.weights(norms)
            assert (weights[:, 1] == 0).all() and (weights[:, 0] > 0).all()

    def test_small_gradients_pass_unchanged_and_weights_fall_with_the_norm(self, name, dtype):
        clipper = CLIPPERS[name]
        num_groups = len(clipper.groups(NAMES))
        norms = torch.logspace(-9, 9, 200, dtype=dtype).expand(num_groups, -1)
        weights = clipper.weights(norms)
        assert (weights[:, 0] == 1).all()
        assert (weights[:, 1:] <= weights[:, :-1]).all()
        # A longer gradient never contributes less: clipping keeps the order of lengths.
        moved = (norms * weights).double()
        assert (moved[:, 1:] >= moved[:, :-1] * (1 - 1e-6)).all()

    def test_groups_partition_the_parameters(self, name, dtype):
        groups = CLIPPERS[name].groups(NAMES)
        assert sorted(n for group in groups for n in group) == sorted(NAMES)

    def test_no_example_is_no_weight(self, name, dtype):
        clipper = CLIPPERS[name]
        assert clipper.weights(torch.zeros(len(clipper.groups(NAMES)), 0, dtype=dtype)).shape[1] == 0


def test_sensitivities():
    assert FlatClipper(2.0).sensitivity == 2.0
    assert CLIPPERS["groups"].sensitivity == pytest.approx(math.hypot(0.3, 2.0))
    assert per_layer(model(), 0.7).sensitivity == pytest.approx(0.7)
    assert per_parameter(model(), [1] * 6).sensitivity == pytest.approx(math.sqrt(6))


def test_per_layer_groups_by_module_and_leaves_out_frozen_parameters():
    frozen = model()
    frozen[0].requires_grad_(False)
    assert per_layer(frozen, 1.0).members == (("2.0.weight", "2.0.bias"), ("2.1.weight", "2.1.bias"))
    assert per_parameter(frozen, [1.0] * 4).members == tuple((n,) for n in NAMES[2:])


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan])
def test_clip_norms_that_bound_nothing_are_refused(clip_norm):
    expected = r"expected a finite clip_norm > 0; got .*; choose the norm beyond which one example's gradient"
    with pytest.raises(ValueError, match=expected):
        FlatClipper(clip_norm)
    with pytest.raises(ValueError, match=expected):
        GroupClipper((("a",), ("b",)), (1.0, clip_norm))
    with pytest.raises(ValueError, match=expected):
        per_layer(model(), clip_norm)


def test_wrong_groups_are_refused():
    with pytest.raises(
        ValueError, match=r"one clip norm per group, 2 of them; got 1; give the list in the order"
    ):
        GroupClipper((("a",), ("b",)), (1.0,))
    with pytest.raises(ValueError, match=r"one clip norm per group, 6 of them; got 2"):
        per_parameter(model(), [1.0, 2.0])
    clipper = GroupClipper((("a", "b"), ("b",)), (1.0, 1.0))
    with pytest.raises(
        ValueError, match=r"each trainable parameter once; got a difference at \['b'\]; build the"
    ):
        clipper.groups(["a", "b"])
    with pytest.raises(ValueError, match=r"got a difference at \['c'\]"):
        clipper.groups(["a", "b", "b", "c"])
    with pytest.raises(ValueError, match=r"got a difference at \['b'\]"):
        clipper.groups(["a"])


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
