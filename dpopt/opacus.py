# SPDX-License-Identifier: Apache-2.0
"""What scripts import from Opacus, under the same names: `from opacus... import X` becomes `from dpopt.opacus import X`.

The submodule does not matter: `opacus.validators.ModuleValidator` and `opacus.utils.batch_memory_manager.BatchMemoryManager`
are both here. What cannot be here can be imported, and says why when it is used. What differs: docs/migration.md.
"""

from __future__ import annotations

from typing import NoReturn

from torch.nn import GRU as DPGRU
from torch.nn import LSTM as DPLSTM
from torch.nn import RNN as DPRNN
from torch.nn import MultiheadAttention as DPMultiheadAttention

from clipping import MixesExamples as UnsupportedModuleError
from dpopt.compatibility.opacus_accountants import (
    GaussianAccountant,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
    get_noise_multiplier,
)
from dpopt.compatibility.poisson_loader import DPDataLoader, UniformWithReplacementSampler
from dpopt.compatibility.schedulers import (
    ExponentialGradClip,
    ExponentialNoise,
    LambdaGradClip,
    LambdaNoise,
    StepGradClip,
    StepNoise,
)
from dpopt.compatibility.validators import ModuleValidator
from dpopt.engine import PrivacyEngine
from dpopt.loader import BatchMemoryManager

__all__ = [
    "DPGRU",
    "DPLSTM",
    "DPRNN",
    "BatchMemoryManager",
    "DPDataLoader",
    "DPMultiheadAttention",
    "ExponentialGradClip",
    "ExponentialNoise",
    "GaussianAccountant",
    "LambdaGradClip",
    "LambdaNoise",
    "ModuleValidator",
    "PRVAccountant",
    "PrivacyEngine",
    "RDPAccountant",
    "StepGradClip",
    "StepNoise",
    "UniformWithReplacementSampler",
    "UnsupportedModuleError",
    "create_accountant",
    "get_noise_multiplier",
]

_NO_WRAPPER = "nothing is wrapped here: use the model itself, and make_private for clipping and noise"
_NO_OPTIMIZER = (
    "any torch optimizer steps after the release: pass yours to make_private, or write the noise yourself as a "
    "dpopt.mechanisms.Mechanism for PrivateTraining"
)
_NO_RANKS = "one process trains; leave the wrapper out"
_NO_SAMPLER = "a layer of your own takes one function: see dpopt.rule"
_REFUSED = {
    "GradSampleModule": _NO_WRAPPER,
    "GradSampleHooks": _NO_WRAPPER,
    "GradSampleModuleFastGradientClipping": _NO_WRAPPER,
    "GradSampleModuleFastGradientClippingFSDP": _NO_WRAPPER,
    "DPLossFastGradientClipping": "the criterion is yours, as it is: make_private(grad_sample_mode='ghost') returns it",
    "DPOptimizer": _NO_OPTIMIZER,
    "AdaClipDPOptimizer": 'make_private(clipping="adaptive") takes its keywords',
    "DPPerLayerOptimizer": 'make_private(clipping="per_layer") takes a list of norms',
    "DistributedDPOptimizer": _NO_RANKS,
    "DifferentiallyPrivateDistributedDataParallel": _NO_RANKS,
    "FSDP2Wrapper": _NO_RANKS,
    "DistributedUniformWithReplacementSampler": _NO_RANKS,
    "DPLightningDataModule": "make_private draws Poisson batches from the loader's dataset; pass your own data module",
    "register_grad_sampler": _NO_SAMPLER,
    "make_functional": "gradients made by hand are not known to be one example's each; run the model itself",
    "register_module_validator": "a module without a rule is refused by itself; give it one with dpopt.rule",
    "register_module_fixer": "replace the module yourself before make_private",
    "forbid_accumulation_hook": "more examples than were drawn are refused without it; leave it out",
    "wrap_data_loader": "use BatchMemoryManager",
}


class NotOffered:
    """Stands where Opacus has something that dpopt has no use for: importing it works, using it says why not."""

    def __init__(self, name: str, bases: tuple[NotOffered, ...] = (), namespace: object = None) -> None:
        if bases:  # Python makes a subclass by calling the type of its base
            raise _not_offered(bases[0].name)
        self.name = name

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Refused, with the way."""
        raise _not_offered(self.name)

    def __getattr__(self, name: str) -> NoReturn:
        """Refused, with the way."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise _not_offered(self.name)

    def __instancecheck__(self, instance: object) -> bool:
        """Nothing is one."""
        return False


def _not_offered(name: str) -> RuntimeError:
    return RuntimeError(
        f"expected a script without {name}; got one that uses it; {_REFUSED[name]} (docs/migration.md tells more)"
    )


def __getattr__(name: str) -> NotOffered:
    if name in _REFUSED:
        return NotOffered(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
