# SPDX-License-Identifier: Apache-2.0
"""An audit in words, for a command line: "canaries=1000", "canaries=500,kind=new-tokens"."""

from __future__ import annotations

from dataclasses import dataclass

from dpopt.audit.canaries.canary import DIRAC

WEIGHTS = "dirac-weights"
KINDS = {
    DIRAC: "gradients at one coordinate each of a layer that is added for them, and that nothing else moves: the sharpest",
    WEIGHTS: "the same at the model's own weights, where records speak too, so that less can be said",
    "new-tokens": "sequences that end with a token of their own, which no text has; scored by the fall of its loss",
    "random-tokens": "sequences of tokens drawn evenly, scored by the fall of their loss",
    "high-temperature": "sequences from the model itself at a high temperature, scored by the fall of their loss",
}
"""What canaries in the fine-tuning of a language model may be."""


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """How many canaries, and of which kind."""

    num: int
    kind: str


def parsed(text: str) -> AuditRequest:
    """Read "canaries=1000,kind=new-tokens".

    Raises:
        ValueError: it says something else.

    Example:
        >>> parsed("canaries=1000")
        AuditRequest(num=1000, kind='dirac')
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in ("canaries", "kind") or key in found or not value:
            raise ValueError(
                f"expected an audit as in canaries=1000,kind=new-tokens; got {text!r}; say how many, and a kind out of "
                f"{', '.join(KINDS)} if it is not dirac"
            )
        found[key] = value
    number, kind = found.get("canaries", ""), found.get("kind", DIRAC)
    if not number.isdecimal() or int(number) < 2:
        raise ValueError(
            f"expected a number of canaries from 2 on; got {number or 'none'}; canaries=1000 is usual"
        )
    if kind not in KINDS:
        raise ValueError(
            f"expected canaries of a kind out of {', '.join(KINDS)}; got {kind!r}; leave it out for dirac"
        )
    return AuditRequest(int(number), kind)
