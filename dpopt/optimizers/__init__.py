# SPDX-License-Identifier: Apache-2.0
"""What acts after the noise: functions of released gradients and public numbers, which cost no budget.

| name | what it does | when to use it |
|---|---|---|
| `AdamBC` | AdamW with the noise's variance taken out of v | noise drowns most gradients and their scales differ |
| `Averaged`, `exponential` | moving average of the weights | the last iterate wanders: large learning rate, much noise |
| `Averaged`, `uniform` | mean of the last iterates | the end of a run at a constant learning rate |
| torch's `SGD(momentum=b, dampening=b)` | moving average of the gradients: private momentum | with SGD, to steady its single steps |
| torch's `Adam`, `AdamW` | the same, over the root of signal and noise | the default; near SGD where noise is large |

Any optimizer of torch is post-processing of a private gradient; this package holds only what torch lacks.

**Private momentum is torch's own.** With `momentum=b, dampening=b` the direction is m_t = b m_(t-1) + (1 - b) g_t, m_1
= g_1. Independent noise of variance s^2 in each gradient leaves in m_t, for large t, the variance kappa s^2 with
kappa = (1 - b) / (1 + b): 0.053 at b = 0.9 (test_private_momentum_is_torch_sgd_with_dampening). The noise is spread over steps, not
removed: over many steps the weights move by the same sum of noises, a little later. `nesterov` needs dampening=0.
"""

from dpopt.optimizers.adam_bc import AdamBC, NoiseStds, NoisyRun, RunOwner, noise_std_of
from dpopt.optimizers.averaging import Averaged, Rule, exponential, uniform

__all__ = [
    "AdamBC",
    "Averaged",
    "NoiseStds",
    "NoisyRun",
    "Rule",
    "RunOwner",
    "exponential",
    "noise_std_of",
    "uniform",
]
