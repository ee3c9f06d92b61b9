# SPDX-License-Identifier: Apache-2.0
"""What torch.compile must forget and look at, so that compiled code of a recorded model runs the tape's hooks.

Compiled code is shared by all models of a class, and by default does not look whether one of them has hooks: code
made for a model without a tape would send gradients past it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch


def untraced(hook: MethodType) -> Callable[..., Any]:
    """`hook`, at which compiled graphs end: it runs as written. Still a method, so that copies ask its owner."""
    disabled = torch.compiler.disable(hook.__func__, reason="private gradients are recorded here")
    return MethodType(disabled, hook.__self__)


class HookGuards:
    """Makes compiled code look at hooks while any tape is attached."""

    def __init__(self) -> None:
        self._users = 0
        self._skipped = True

    def enter(self) -> None:
        """Drop all compiled code, which knows nothing of the hooks, and have new code look at them."""
        from torch._dynamo import (
            config,  # a second long; optimizers import it too, but not every use of the package
        )

        if self._users == 0:
            self._skipped = config.skip_nnmodule_hook_guards
            config.skip_nnmodule_hook_guards = False
        self._users += 1
        torch.compiler.reset()

    def leave(self) -> None:
        """Drop all compiled code, which ends its graphs at hooks, and put the setting back."""
        from torch._dynamo import config

        self._users -= 1
        if self._users == 0:
            config.skip_nnmodule_hook_guards = self._skipped
        torch.compiler.reset()


HOOK_GUARDS = HookGuards()
