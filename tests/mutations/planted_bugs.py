# SPDX-License-Identifier: Apache-2.0
"""All planted bugs."""

from tests.mutations import bugs_of_accounting as bugs_of_accounting
from tests.mutations import bugs_of_clipping as bugs_of_clipping
from tests.mutations import bugs_of_noise as bugs_of_noise
from tests.mutations.mutating import Mutation

MUTATIONS: tuple[Mutation, ...] = (*bugs_of_noise.BUGS, *bugs_of_clipping.BUGS, *bugs_of_accounting.BUGS)
