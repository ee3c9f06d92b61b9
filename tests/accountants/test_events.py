# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import (
    Composed,
    Gaussian,
    NonPrivate,
    PoissonSampled,
    Repeated,
    UnpricedEvent,
    from_dict,
    leaves,
    to_dict,
)

gaussians = st.builds(Gaussian, st.floats(0.1, 10))
mechanisms = gaussians | st.builds(PoissonSampled, st.floats(0, 1), gaussians) | st.just(NonPrivate())
events = st.recursive(
    mechanisms,
    lambda inner: (
        st.builds(Repeated, inner, st.integers(0, 9))
        | st.builds(Composed, st.lists(inner, max_size=3).map(tuple))
    ),
    max_leaves=6,
)


@given(events)
def test_json_round_trip(event):
    assert from_dict(json.loads(json.dumps(to_dict(event)))) == event


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Gaussian(-1.0), r"noise_multiplier must be a finite number >= 0; got -1.0; pass noise std"),
        (lambda: Gaussian(float("nan")), "got nan"),
        (lambda: Gaussian(float("inf")), "got inf"),
        (lambda: Gaussian(True), "got True"),
        (
            lambda: PoissonSampled(1.5, Gaussian(1)),
            r"sampling_rate must be a probability in \[0, 1\]; got 1.5",
        ),
        (lambda: PoissonSampled(0.5, 1.0), "event must be an event; got 1.0; wrap a mechanism"),
        (lambda: Repeated(Gaussian(1), 2.0), "count must be an integer >= 0; got 2.0"),
        (lambda: Repeated(Gaussian(1), -1), "count must be an integer >= 0; got -1"),
        (lambda: Composed([Gaussian(1)]), "events must be a tuple of events"),
        (lambda: Composed((Gaussian(1), 3)), r"events\[1\] must be an event; got 3"),
        (lambda: from_dict({"kind": "Laplace", "scale": 1}), "kind must be one of Gaussian.*got 'Laplace'"),
        (lambda: from_dict({"kind": "Gaussian"}), "Gaussian must have exactly the fields"),
        (lambda: from_dict({"kind": "Gaussian", "noise_multiplier": 1.0, "l": 2}), "remove the unknown ones"),
        (lambda: from_dict({"kind": ["Gaussian"]}), "kind must be one of"),
        (lambda: from_dict([1]), "an event must be a mapping"),
        (lambda: from_dict({"kind": "Gaussian", "noise_multiplier": [1]}), "event must be a mapping"),
    ],
)
def test_refusals_say_expected_got_remedy(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_leaves_are_merged_and_canonical():
    step = PoissonSampled(0.1, Gaussian(2.0))
    nest = Composed((Repeated(step, 3), Gaussian(1.0), Repeated(Composed((step, Gaussian(1.0))), 2)))
    assert dict(leaves(nest)) == {step: 5, Gaussian(1.0): 3}
    assert leaves(nest) == leaves(Composed(nest.events[::-1]))


def test_leaves_normalise():
    assert leaves(PoissonSampled(1.0, Gaussian(2.0))) == ((Gaussian(2.0), 1),)
    assert leaves(PoissonSampled(0.0, Gaussian(2.0))) == ()
    assert leaves(Repeated(NonPrivate(), 0)) == ()
    assert leaves(PoissonSampled(0.1, Gaussian(0.0))) == ((NonPrivate(), 1),)
    assert leaves(PoissonSampled(1.0, PoissonSampled(0.5, Gaussian(1.0))))[0][0] == PoissonSampled(
        0.5, Gaussian(1.0)
    )


def test_unpriced_event_names_the_leaf_and_its_path():
    shared = PoissonSampled(0.1, Repeated(Gaussian(1.0), 2))
    with pytest.raises(
        UnpricedEvent, match=r"event\.Composed\.events\[1\]\.Repeated\.event\.PoissonSampled\.event"
    ) as e:
        leaves(Composed((Gaussian(1.0), Repeated(shared, 4))))
    assert "Gaussian(noise_multiplier=1.0)" in str(e.value)
    with pytest.raises(UnpricedEvent, match="event must be an event; got 'dp'; use NonPrivate"):
        leaves("dp")
    with pytest.raises(UnpricedEvent, match="got 'dp'"):
        to_dict("dp")
