# SPDX-License-Identifier: Apache-2.0
"""A cryptographic stream of words.

The cipher is AES-256 in counter mode, from the library `cryptography` (the extra `secure`). Each domain of a run's
key has an AES key of its own (SHAKE-256 of both), and each part of a domain 2^64 counters of its own.

AES: NIST (2001), FIPS 197. Counter mode and the known answers of the tests: Dworkin (2001), NIST SP 800-38A.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpopt.randomness.keys import RandomKey, subkey

Words = NDArray[np.int64]
"""64 random bits in each element; the sign bit is a bit like the others."""

_ZEROS = bytes(1 << 18)
_UNSIGNED = 1 << 64


@dataclass(frozen=True, slots=True, repr=False)
class CipherKey:
    """The AES-256 key of one domain; never stored, logged or shown."""

    secret: bytes

    def __repr__(self) -> str:
        return "CipherKey(<hidden>)"

    def stream(self, part: int = 0) -> WordStream:
        """The stream of part number `part`, from its beginning."""
        return WordStream(self, part)


def cipher_key(key: RandomKey, *domain: str | int) -> CipherKey:
    """The cipher key of one domain of `key`; the same domain gives the same key."""
    return CipherKey(subkey(key, *domain))


class WordStream:
    """Words of one part of one domain: AES-256 of the counters part * 2^64, part * 2^64 + 1, ...

    Guarantees
    ----------
    No two words of a domain come from one counter: 2^64 blocks of 16 bytes last for 3 * 10^20 bytes a part, far
    beyond what any process draws (test_no_stream_repeats_across_names_steps_and_parts). To tell the words from
    uniform ones is to break AES-256 or SHAKE-256; every claim built on them is computational to that extent
    (Mironov, Pandey, Reingold, Vadhan 2009, CRYPTO, "Computational differential privacy").
    """

    def __init__(self, key: CipherKey, part: int = 0) -> None:
        if not 0 <= part < _UNSIGNED:
            raise ValueError(f"expected 0 <= part < 2^64; got {part}; number the parts of a domain from 0")
        self._encryptor = _encryptor(key.secret, part)

    def fill(self, words: Words) -> None:
        """Overwrite the contiguous `words` with the next words of the stream."""
        data = words.view(np.uint8).data
        for start in range(0, len(data), len(_ZEROS)):
            piece = data[start : start + len(_ZEROS)]
            self._encryptor.update_into(memoryview(_ZEROS)[: len(piece)], piece)

    def words(self, count: int) -> Words:
        """The next `count` words."""
        words = np.empty(count, dtype=np.int64)
        self.fill(words)
        return words

    def integer(self) -> int:
        """The next word, as an integer in [0, 2^64)."""
        return int(self.words(1)[0]) % _UNSIGNED


def require_cryptography() -> None:
    """Raise ImportError where the library is missing."""
    _encryptor(bytes(32), 0)


def _encryptor(secret: bytes, part: int):
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError as error:
        raise ImportError(
            "expected the library `cryptography` for secure randomness; got none; pip install 'dpopt[secure]'"
        ) from error
    counter = part.to_bytes(8, "big") + bytes(8)
    return Cipher(algorithms.AES(secret), modes.CTR(counter)).encryptor()
