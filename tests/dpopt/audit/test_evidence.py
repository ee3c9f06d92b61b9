# SPDX-License-Identifier: Apache-2.0
"""Evidence that exists is well-formed; writing and reading loses nothing."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpopt.audit.evidence import Evidence, joined

FLOATS = st.floats(allow_nan=False, width=64)


@given(
    st.lists(st.tuples(FLOATS, st.booleans()), min_size=1), st.booleans(), st.none() | st.floats(1e-9, 1e9)
)
def test_json_loses_nothing(pairs, independent, noise_std):
    scores, included = (list(column) for column in zip(*pairs, strict=True))
    one = Evidence(scores, included, "dirac", independent, noise_std, 7, 0.25)
    back = Evidence.from_json(one.to_json())
    assert back.scores.tobytes() == one.scores.tobytes()
    assert back.included.tolist() == included
    rest = ("kind", "independent", "noise_std", "num_steps", "sampling_rate")
    assert [getattr(back, name) for name in rest] == [getattr(one, name) for name in rest]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scores": [1.0, math.nan]}, "NaN"),
        ({"scores": [[1.0], [2.0]]}, "shape"),
        ({"scores": []}, "shape"),
        ({"scores": "ab"}, "numbers"),
        ({"included": [True]}, "one for each score"),
        ({"included": [1, 0]}, "booleans"),
        ({"kind": ""}, "words"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"noise_std": math.inf}, "noise_std"),
        ({"num_steps": 3}, "together"),
        ({"num_steps": 0, "sampling_rate": 0.5}, "num_steps"),
        ({"num_steps": 3, "sampling_rate": 0.0}, "sampling_rate"),
    ],
)
def test_what_cannot_be_is_refused(change, told):
    fields = {"scores": [1.0, 2.0], "included": [True, False], "kind": "dirac"} | change
    with pytest.raises(ValueError, match=told) as refused:
        Evidence(**fields)
    assert str(refused.value).count(";") >= 2


@pytest.mark.parametrize("text", ["[]", '{"scores": [1]}', '{"scores": [1], "included": [2], "kind": "x"}'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="must"):
        Evidence.from_json(text)


def test_an_unknown_field_is_refused():
    data = json.loads(Evidence([1.0], [True], "dirac").to_json()) | {"colour": 1}
    with pytest.raises(ValueError, match="colour"):
        Evidence.from_json(json.dumps(data))


def test_scores_cannot_be_changed():
    given_scores = np.zeros(2)
    one = Evidence(given_scores, [True, False], "dirac")
    given_scores[0] = 9.0
    assert one.scores[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        one.scores[0] = 1.0


def test_joining():
    one, two = Evidence([1.0], [True], "dirac"), Evidence([2.0, 3.0], [False, True], "dirac")
    both = joined((one, two))
    assert both.scores.tolist() == [1.0, 2.0, 3.0] and both.num_included == 2
    with pytest.raises(ValueError, match="one kind"):
        joined((one, Evidence([1.0], [True], "loss")))
    with pytest.raises(ValueError, match="none"):
        joined(())
