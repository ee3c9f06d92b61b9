# SPDX-License-Identifier: Apache-2.0
"""A stream of random words that gives what it is told."""

import numpy as np


class Scripted:
    """A stream that gives the words it is told to give."""

    def __init__(self, *integers):
        self.left = list(integers)

    def integer(self):
        return self.left.pop(0)

    def words(self, count):
        return np.array([self.integer() for _ in range(count)], dtype=np.uint64).view(np.int64)
