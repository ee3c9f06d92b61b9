# SPDX-License-Identifier: Apache-2.0
"""P-values of what independent inclusion at a rate would give."""

import numpy as np
from scipy import stats

RATE, RECORDS, DRAWS = 0.3, 60, 8000

SMALL = 1e-7


def matrix(draws):
    taken = np.zeros((len(draws), RECORDS))
    for row, indices in zip(taken, draws, strict=True):
        row[indices] = 1
    return taken


def p_values(taken, rate):
    """Of the total, of the counts by record, of the variance of batch sizes, and of all pairs of records."""
    num_draws, num_records = taken.shape
    spread = rate * (1 - rate)
    centred = taken - rate
    total = 2 * stats.norm.sf(abs(centred.sum()) / np.sqrt(taken.size * spread))
    by_record = stats.chi2.sf((centred.sum(0) ** 2).sum() / (num_draws * spread), num_records)
    sizes = centred.sum(1) ** 2 / (num_records * spread)
    kurtosis = 2 + (1 - 6 * spread) / spread / num_records
    variance = 2 * stats.norm.sf(abs(sizes.sum() - num_draws) / np.sqrt(num_draws * kurtosis))
    pairs = (centred.T @ centred / spread / np.sqrt(num_draws))[np.triu_indices(num_records, 1)]
    covariance = stats.chi2.sf((pairs**2).sum(), pairs.size)
    return {"total": total, "by_record": by_record, "variance": variance, "pairs": covariance}
