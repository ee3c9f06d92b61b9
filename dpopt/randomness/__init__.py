# SPDX-License-Identifier: Apache-2.0
"""Secret randomness: keys by domain, a cipher's stream, and normal numbers made of either."""

from dpopt.randomness.keys import RandomKey, generator, insecure_key, secret_key, subkey

__all__ = [
    "RandomKey",
    "generator",
    "insecure_key",
    "secret_key",
    "subkey",
]
