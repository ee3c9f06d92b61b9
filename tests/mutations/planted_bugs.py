# SPDX-License-Identifier: Apache-2.0
"""All planted bugs."""

import bugs_of_accounting
import bugs_of_clipping
import bugs_of_noise
from mutating import Mutation

MUTATIONS: tuple[Mutation, ...] = (*bugs_of_noise.BUGS, *bugs_of_clipping.BUGS, *bugs_of_accounting.BUGS)
