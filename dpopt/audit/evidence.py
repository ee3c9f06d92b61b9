# SPDX-License-Identifier: Apache-2.0
"""What an audit looks at: scores of records of which a secret coin decided whether each took part.

The law of this file: **an Evidence that exists is well-formed**, and writing and reading it loses nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_FIELDS = ("scores", "included", "kind", "independent", "noise_std", "num_steps", "sampling_rate")


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Scores of records of which a secret fair coin decided whether each took part.

    Args:
        scores: shape (m,), float64; the higher, the more it looks as though the record took part. Infinite scores are
            allowed, NaN is not: decide first what an unusable score means.
        included: shape (m,), bool; what each coin said.
        kind: what the records and the scores are, in a few words: "dirac", "new tokens", "mislabelled", ...
        independent: whether the scores, given the coins, are independent of one another (each record has a
            coordinate of the noise to itself). Audits of one run that pool canaries as though they were runs need it.
        noise_std: the standard deviation of the Gaussian noise in each score as the run's own record states it, where
            the scores are known to be a constant, or a constant more when included, plus independent noise; else None.
        num_steps: where each score is one record's share in ONE step (and `included` says whether it was in that
            step's batch): how many such steps the run had. None where a score is about the whole run.
        sampling_rate: the Poisson rate of those steps; given exactly where `num_steps` is.

    Raises:
        ValueError: a shape, a type or a number that cannot be.

    Example:
        >>> Evidence([3.0, -1.0], [True, False], "dirac").num_records
        2
    """

    scores: FloatArray
    included: BoolArray
    kind: str
    independent: bool = False
    noise_std: float | None = None
    num_steps: int | None = None
    sampling_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _scores(self.scores))
        object.__setattr__(self, "included", _included(self.included, len(self.scores)))
        if not (isinstance(self.kind, str) and self.kind):
            raise ValueError(f"kind must be a few words; got {self.kind!r}; say what the records are")
        if self.noise_std is not None and not (math.isfinite(self.noise_std) and self.noise_std > 0):
            raise ValueError(
                f"noise_std must be a number > 0, or None where it is not known; got {self.noise_std!r}; leave it out"
            )
        _check_steps(self.num_steps, self.sampling_rate)

    @property
    def num_records(self) -> int:
        """How many records were scored: m."""
        return len(self.scores)

    @property
    def num_included(self) -> int:
        """How many of them took part."""
        return int(self.included.sum())

    @property
    def per_step(self) -> bool:
        """Whether each score is about one step of the run, not about the whole of it."""
        return self.num_steps is not None

    def to_json(self) -> str:
        """As JSON on one line; the numbers are those of `from_json`, bit for bit."""
        data: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        data["scores"] = [x if math.isfinite(x) else f"{x:+}" for x in self.scores.tolist()]
        data["included"] = [int(x) for x in self.included.tolist()]
        return json.dumps(data, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no such JSON, or holds an unknown field.
        """
        data = json.loads(text)
        if (
            not isinstance(data, dict)
            or set(data) - set(_FIELDS)
            or not {"scores", "included", "kind"} <= set(data)
        ):
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"evidence must be JSON with the fields {_FIELDS}; got {got}; write it by to_json()"
            )
        return cls(
            **(data | {"scores": [float(x) for x in data["scores"]], "included": _bools(data["included"])})
        )


def joined(evidence: tuple[Evidence, ...]) -> Evidence:
    """One Evidence of several that differ in nothing but scores and coins, e.g. of many runs of one configuration.

    Raises:
        ValueError: there is none, or two of them are about different things.
    """
    if not evidence:
        raise ValueError("expected at least one evidence; got none; give the evidence of a run")
    first = evidence[0]
    about = [[getattr(one, name) for name in _FIELDS[2:]] for one in evidence]
    if any(one != about[0] for one in about):
        raise ValueError(
            f"evidence that is joined must be of one kind, noise and schedule; got {about}; audit the runs one by one"
        )
    scores = np.concatenate([one.scores for one in evidence])
    return Evidence(
        scores, np.concatenate([one.included for one in evidence]), *[getattr(first, n) for n in _FIELDS[2:]]
    )


def _scores(given: object) -> FloatArray:
    try:
        scores = np.array(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"scores must be m numbers; got {type(given).__name__}; pass a float array of shape (m,)"
        ) from error
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"scores must have the shape (m,) with m >= 1; got {scores.shape}; pass one number for each record"
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"scores must not be NaN; got {int(np.isnan(scores).sum())} of them; give unusable scores one fixed number "
            "that does not depend on the coins"
        )
    scores.setflags(write=False)
    return scores


def _included(given: object, m: int) -> BoolArray:
    included = np.array(given)
    if included.dtype != np.bool_ or included.shape != (m,):
        raise ValueError(
            f"included must be m = {m} booleans; got {included.dtype} of shape {included.shape}; pass one for each score"
        )
    included.setflags(write=False)
    return included


def _bools(values: list[object]) -> list[bool]:
    if any(value not in (0, 1) for value in values):
        raise ValueError(
            "included must hold 0 and 1 only; got something else; write the evidence by to_json()"
        )
    return [bool(value) for value in values]


def _check_steps(num_steps: int | None, sampling_rate: float | None) -> None:
    if (num_steps is None) != (sampling_rate is None):
        raise ValueError(
            f"num_steps and sampling_rate must be given together; got {num_steps!r} and {sampling_rate!r}; give both "
            "where each score is about one step, else neither"
        )
    if num_steps is not None and (
        isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1
    ):
        raise ValueError(
            f"num_steps must be an integer >= 1; got {num_steps!r}; pass the number of steps of the run"
        )
    if sampling_rate is not None and not 0 < sampling_rate <= 1:
        raise ValueError(
            f"sampling_rate must be in (0, 1]; got {sampling_rate!r}; pass the rate of the run's sampler"
        )
