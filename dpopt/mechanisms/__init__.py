# SPDX-License-Identifier: Apache-2.0
"""What adds the noise: everything before a mechanism is sensitive, everything after it is public."""

from dpopt.mechanisms.gaussian import GaussianMechanism, Mechanism, NoiseSource

__all__ = ["GaussianMechanism", "Mechanism", "NoiseSource"]
