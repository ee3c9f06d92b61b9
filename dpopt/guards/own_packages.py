# SPDX-License-Identifier: Apache-2.0
"""Refuses strangers in the place of the packages that dpopt is made of; importing this file asks.

Python looks into the folder of a script first: an `accountants.py` or `clipping.py` of the user's own, or another
installed package of that name, would be taken for dpopt's, and fail somewhere inside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

NAMES = ("accountants", "clipping")


def require_own(names: Iterable[str] = NAMES, beside: Path | None = None) -> None:
    """Refuse packages `names` that come from another folder than that which holds dpopt.

    Args:
        names: import names of packages.
        beside: the folder they belong in (default: that of the dpopt package).

    Raises:
        ImportError: Python finds another file or folder under such a name, which is named.
    """
    home = Path(__file__).resolve().parents[2] if beside is None else beside
    for name in names:
        found = _places(_found(name))
        if found and (home / name).resolve() not in found:
            raise ImportError(
                f"expected dpopt's own package {name!r} in {home}; got {found[0]}, which Python finds first and which "
                f"hides it; rename {found[0].name!r} (and the imports of it), or run Python where it is not on the "
                "path, with `python -P` for instance"
            )


def _found(name: str) -> ModuleSpec | None:
    known = sys.modules.get(name)
    # A module somebody made by hand has no specification, and find_spec does not like that.
    return getattr(known, "__spec__", None) if known is not None else find_spec(name)


def _places(spec: ModuleSpec | None) -> list[Path]:
    """The folders of a package, or the file of a module."""
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place).resolve() for place in spec.submodule_search_locations]
    return [Path(spec.origin).resolve()] if spec.has_location and spec.origin else []


require_own()
